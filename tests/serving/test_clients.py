"""The real clients: the package of OpenAI, and LiteLLM's generic guardrail."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import Server, serving

from gradsafe import Detector

KEY = "a-key"


@pytest.fixture(scope="module")
def guarded(model_folder: Path, detector_folder: Path) -> Iterator[Server]:
    with serving(model_folder, detector_folder, keys=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def pair(detector: Detector, prompts: list[str]) -> tuple[str, str]:
    """A harmless prompt and one that the detector flags."""
    flags = detector.flag(prompts, progress=False).tolist()
    return prompts[flags.index(False)], prompts[flags.index(True)]


class TestOpenAI:
    @pytest.fixture
    def client(self, guarded: Server) -> Any:
        openai = pytest.importorskip("openai", reason="the client of OpenAI")
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)

    def test_it_reads_the_answers(
        self, client: Any, pair: tuple[str, str], detector: Detector
    ) -> None:
        answer = client.moderations.create(input=list(pair), model="gradsafe")
        assert [result.flagged for result in answer.results] == [False, True]
        expected = detector.score(pair, progress=False).values.tolist()
        scores = [result.category_scores.unsafe for result in answer.results]
        assert scores == pytest.approx(expected, abs=1e-6)
        assert [result.categories.unsafe for result in answer.results] == [False, True]
        assert answer.model == "gradsafe"
        assert answer.id.startswith("modr-")
        assert client.moderations.create(input=pair[1]).results[0].flagged
        parts = [{"type": "text", "text": pair[1]}]
        assert client.moderations.create(input=parts).results[0].flagged

    def test_it_raises_its_own_errors(self, client: Any) -> None:
        import openai

        with pytest.raises(openai.NotFoundError) as caught:
            client.moderations.create(input="hello", model="omni-moderation-latest")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as caught:
            client.moderations.create(input="word " * 2000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").moderations.create(input="hello")


class TestLiteLLM:
    @pytest.fixture
    def guardrail(self, guarded: Server) -> Any:
        # It fetches a list of prices while it is imported, unless told not to.
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        pytest.importorskip("litellm", reason="the proxy of LiteLLM")
        from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import (
            generic_guardrail_api as module,
        )

        return module.GenericGuardrailAPI(
            api_base=guarded.url, api_key=KEY, guardrail_name="gradsafe", event_hook="pre_call"
        )

    def check(self, guardrail: Any, inputs: dict[str, Any], input_type: str = "request") -> Any:
        data: dict[str, Any] = {"metadata": {}}
        # A client of one event loop is no use in another.
        from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

        async def run() -> Any:
            guardrail.async_handler = AsyncHTTPHandler(timeout=60)
            try:
                return await guardrail.apply_guardrail(
                    inputs=inputs, request_data=data, input_type=input_type
                )
            finally:
                await guardrail.async_handler.close()

        return asyncio.run(run())

    def test_it_passes_harmless_texts_and_blocks_others(
        self, guardrail: Any, pair: tuple[str, str]
    ) -> None:
        from litellm.exceptions import GuardrailRaisedException

        harmless, flagged = pair
        messages = [{"role": "user", "content": harmless}]
        inputs = {"texts": [harmless], "structured_messages": messages, "model": "any-model"}
        assert self.check(guardrail, inputs)["texts"] == [harmless]
        assert self.check(guardrail, {"texts": []})["texts"] == []
        with pytest.raises(GuardrailRaisedException, match="flagged as unsafe"):
            self.check(guardrail, {"texts": [harmless, flagged]})

    def test_what_it_cannot_judge_is_an_error_and_does_not_pass(
        self, guardrail: Any, pair: tuple[str, str]
    ) -> None:
        with pytest.raises(Exception, match=r"Generic Guardrail API failed.*400"):
            self.check(guardrail, {"texts": [pair[0]]}, "response")
        with pytest.raises(Exception, match=r"Generic Guardrail API failed.*400"):
            self.check(guardrail, {"texts": [pair[0]], "images": ["data:image/png;base64,AA=="]})
        with pytest.raises(Exception, match=r"Generic Guardrail API failed.*400"):
            self.check(guardrail, {"texts": ["word " * 2000]})

    def test_a_wrong_key_does_not_pass(self, guardrail: Any, pair: tuple[str, str]) -> None:
        guardrail.headers["x-api-key"] = "wrong"
        with pytest.raises(Exception, match=r"Generic Guardrail API failed.*401"):
            self.check(guardrail, {"texts": [pair[0]]})
