"""The operators alone: every one on random tensors, next to the plain PyTorch formula.

    python examples/operators.py --tiny

They take lists of tensors, run on CPU and CUDA, and need no model.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional

from gradsafe import ops


def detection(device: str) -> None:
    """The sums behind the detection scores."""
    # A gradient and two references, read once.
    grad = torch.randn(96, 64, device=device)
    unsafe, safe = torch.rand(2, 96, 64, device=device)
    found = ops.moments([grad], [[unsafe, safe]])
    plain = torch.stack([(grad.abs() * reference).sum() for reference in (unsafe, safe)])
    torch.testing.assert_close(found.dots[0].float(), plain)
    torch.testing.assert_close(found.std()[0].float(), grad.std(correction=0))
    print("moments: dots", found.dots[0].tolist())

    # The same for the weight gradients of a linear layer, one per sample: none is ever stored.
    x, dy = torch.randn(4, 10, 64, device=device), torch.randn(4, 10, 96, device=device)
    found = ops.wgrad_moments(x, dy, [unsafe, safe], lengths=[10, 10, 7, 3])
    first = dy[0].T @ x[0]
    torch.testing.assert_close(found.dots[0, 0].float(), (first.abs() * unsafe).sum())
    print("wgrad_moments: dots", list(found.dots.shape))

    # Fused experts: tokens are sorted by segment, and every segment belongs to one expert.
    experts = torch.rand(8, 96, 64, device=device)
    found = ops.grouped_wgrad_moments(
        x.flatten(0, 1), dy.flatten(0, 1), [experts], lengths=[5, 15, 20], experts=[0, 3, 7]
    )
    segment = dy.flatten(0, 1)[5:20].T @ x.flatten(0, 1)[5:20]
    torch.testing.assert_close(found.dots[1, 0].float(), (segment.abs() * experts[3]).sum())
    print("grouped_wgrad_moments: dots", list(found.dots.shape))


def tracing(device: str) -> None:
    """Nearest rows by cosine similarity; the [Q, N] matrix is never stored."""
    queries, rows = torch.randn(3, 32, device=device), torch.randn(1000, 32, device=device)
    found = ops.cosine_topk(queries, rows, k=5)
    similarities = functional.normalize(queries) @ functional.normalize(rows).T
    assert found.indices.equal(similarities.topk(5).indices)
    print("cosine_topk: best rows", found.indices[:, 0].tolist())


def finetuning(device: str) -> None:
    """SafeGrad's projection and its alignment loss."""
    user = [torch.randn(40, 30, device=device), torch.randn(30, device=device)]
    align = [-0.5 * gradient + 0.1 * torch.randn_like(gradient) for gradient in user]
    copies = [gradient.clone() for gradient in user]
    dot, _, sq_align, coefficient = ops.surgery_(user, align, rho=1.0).tolist()
    torch.testing.assert_close(user[0], copies[0] + coefficient * align[0])
    after = sum(float((u * a).sum()) for u, a in zip(user, align, strict=True))
    print(f"surgery_: <user, align> {dot:.1f} before, {after:.1f} = <align, align> after")
    assert abs(after - sq_align) < 1e-2 * sq_align

    # The same with the AdamW step in one pass; the merged gradient is never written.
    params = [torch.randn_like(gradient) for gradient in copies]
    averages = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    step = torch.zeros(1, device=device)
    ops.surgery_adamw_(params, copies, align, *averages, step, lr=1e-3)
    print("surgery_adamw_: step", int(step))

    # Afterwards `student` holds the gradient of the weighted sum of divergences.
    student, teacher = torch.randn(6, 100, device=device), torch.randn(6, 100, device=device)
    difference = student.softmax(-1) - teacher.softmax(-1)
    divergence = ops.kl_divergence_(student, teacher, torch.ones(6, device=device))
    torch.testing.assert_close(student, difference)
    print("kl_divergence_: mean", round(divergence.mean().item(), 4))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="accepted for uniformity")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    detection(args.device)
    tracing(args.device)
    finetuning(args.device)


if __name__ == "__main__":
    main()
