"""Columns of the operators' tables in docs/measured.md: key of a CSV row, and heading."""

from __future__ import annotations

COLUMNS = {
    "moments": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_read", "time / read"),
        ("x_eager", "vs eager"),
        ("x_shared", "vs eager, products shared"),
        ("x_foreach", "vs foreach"),
        ("x_compile", "vs compile"),
    ],
    "surgery": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_copy", "time / copy"),
        ("x_cat", "vs cat"),
        ("x_foreach", "vs dot + foreach"),
    ],
    "surgery_adamw": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_copy", "time / copy"),
        ("x_fused", "vs fused AdamW alone"),
        ("x_two", "vs surgery_, then fused AdamW"),
        ("x_foreach", "vs dot + foreach, then fused AdamW"),
    ],
    "wgrad_moments": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare GEMM"),
        ("x_eager", "vs GEMM + eager"),
        ("x_compile", "vs compile"),
    ],
    "grouped_wgrad_moments": [
        ("case", "case"),
        ("segments", "segments"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare grouped GEMM"),
        ("x_loop", "vs loop over experts"),
    ],
    "cosine_topk": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare GEMM"),
        ("x_read", "time / read"),
        ("x_eager", "vs normalise + matmul + topk"),
        ("x_compile", "vs compile"),
        ("x_loop", "vs loop over pairs"),
    ],
    "kl_divergence": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_read", "time / read of both"),
        ("x_eager", "vs eager"),
        ("x_closed_form", "vs closed form"),
        ("x_compile", "vs compile"),
    ],
}
