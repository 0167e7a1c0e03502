"""vLLM's own OpenAI routes around an engine that runs already, and the guard between the two.

The application has the three routes below `/v1` and nothing else of vLLM's server. Its requests go to the engine
that samples trees, so what could harm that engine or its trees is refused here, with OpenAI's kind of error.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completions
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.engines.base import EngineInfo
from server.engines.vllm_start import AsyncLLM, RequestOutput, SamplingParams
from shared.errors import EngineError

MAX_SAMPLES = 128
"""Of one prompt; OpenAI's own limit."""
MAX_STOPS = 16
"""Stop strings of one request, as in `POST /rollout_tree`."""
SERVED = frozenset({
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    "logprob_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "include_stop_str_in_output",
    "skip_special_tokens", "spaces_between_special_tokens", "stream_interval",
    # These no caller writes: vLLM's routes set them.
    "flat_logprobs", "detokenize", "output_kind", "skip_clone", "output_text_buffer_length",
    "skip_reading_prefix_cache",
})  # fmt: skip
"""Fields of vLLM's `SamplingParams` that a request may set. Any other one, of this vLLM or a later, is refused."""
WRITTEN_AS = {
    "structured_outputs": "response_format, structured_outputs or a tool that must be called",
    "extra_args": "vllm_xargs, kv_transfer_params or ec_transfer_params",
}
LEFT_OUT = {"use_beam_search": False, "best_of": 1, "length_penalty": 1.0}
"""What vLLM's routes would do past `generate`, step by step, and the value at which each changes nothing."""
REACHED = frozenset({
    "vllm_config", "model_config", "renderer", "input_processor", "errored", "dead_error", "is_running",
    "check_admission", "get_supported_tasks",
})  # fmt: skip
"""What vLLM's routes need of the engine besides `generate`."""


class GuardedLLM:
    """An AsyncLLM as vLLM's routes see it: it samples, within limits, and can be asked for nothing else.

    Args:
        llm: the engine.
        info: its limits.
        alive: gives a call's answer, or an EngineError once vLLM's process is gone.
        busy: counts a request as running while it is open.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        info: EngineInfo,
        alive: Callable[[Awaitable[Any]], Awaitable[Any]],
        busy: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._llm = llm
        self._info = info
        self._alive = alive
        self._busy = busy

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the engine has by that name
        if name not in REACHED:
            raise AttributeError(f"the OpenAI routes may not reach {name} of the engine")
        return getattr(self._llm, name)

    def generate(
        self,
        prompt: Any,  # noqa: ANN401 - vLLM's EngineInput
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        **_routing: object,
    ) -> AsyncIterator[RequestOutput]:
        """What vLLM samples for one prompt. Tracing, sessions and replicas, which we have not, are left out.

        Checks at the call, not at the first output: a stream that is refused is a 400 and not a broken 200.

        Raises:
            VLLMValidationError: the request is refused.
        """
        if priority != 0:
            raise VLLMValidationError(
                "priority cannot be chosen here; leave it out", parameter="priority"
            )
        check_prompt(prompt, self._info)
        check_params(sampling_params)
        config = self._llm.vllm_config
        sampling_params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            self._llm.renderer.tokenizer,
        )
        return self._outputs(prompt, sampling_params, request_id)

    async def _outputs(
        self,
        prompt: Any,  # noqa: ANN401 - vLLM's EngineInput
        params: SamplingParams,
        request_id: str,
    ) -> AsyncIterator[RequestOutput]:
        # Closed with us: a generator of vLLM's that is closed aborts its request.
        async with contextlib.aclosing(self._llm.generate(prompt, params, request_id)) as outputs:
            with self._busy():
                while (output := await self._next(outputs)) is not None:
                    yield output

    async def _next(self, outputs: AsyncIterator[RequestOutput]) -> RequestOutput | None:
        try:
            return await self._alive(anext(outputs, None))
        except EngineError as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error


def check_prompt(prompt: Any, info: EngineInfo) -> None:  # noqa: ANN401 - vLLM's EngineInput
    """Refuse what is not token ids of the model.

    Raises:
        VLLMValidationError: saying why.
    """
    if prompt["type"] != "token":
        raise VLLMValidationError("only text and token ids are served here", parameter="prompt")
    ids = prompt["prompt_token_ids"]
    # vLLM lets the tokenizer's ids pass, and the vocabulary of the model may be smaller.
    if ids and max(ids) >= info.vocab_size:
        raise VLLMValidationError(
            f"token {max(ids)} is outside the model's vocabulary of {info.vocab_size}",
            parameter="prompt",
        )


async def check_body(request: Request) -> None:
    """Refuse what no `SamplingParams` would show.

    Raises:
        VLLMValidationError: naming it.
    """
    try:
        body = await request.json()
    except ValueError:  # there is none, or it is no JSON, which is the routes' to say
        return
    if not isinstance(body, dict):
        return
    for name, harmless in LEFT_OUT.items():
        if body.get(name) not in (None, harmless):
            raise VLLMValidationError(
                f"{name}: beams cannot be served here; leave it out", parameter=name
            )


def check_params(params: SamplingParams) -> None:
    """Refuse settings that are not served, or that vLLM would take and fail on later.

    Raises:
        VLLMValidationError: naming the setting.
    """
    for name in SamplingParams.__struct_fields__:
        # What a request leaves out is None, 0, False or empty.
        if name not in SERVED and not name.startswith("_") and getattr(params, name):
            written = WRITTEN_AS.get(name, name)
            raise VLLMValidationError(
                f"{written} cannot be served here; leave it out",
                parameter=written.partition(",")[0],
            )
    limits = [
        ("n", params.n <= MAX_SAMPLES, f"at most {MAX_SAMPLES}"),
        ("stop", len(params.stop) <= MAX_STOPS, f"at most {MAX_STOPS} strings"),
        ("top_k", params.top_k < 2**31, "below 2^31"),
        ("stream_interval", (params.stream_interval or 1) < 2**31, "below 2^31"),
        # Sample i draws from seed + i, which must be a 64-bit number too.
        ("seed", (params.seed or 0) <= 2**63 - params.n, "at most 2^63 - n"),
        # Further out the logits are no numbers any more.
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "from 0.01 to 100"),
    ]
    for name, holds, wanted in limits:
        if not holds:
            raise VLLMValidationError(f"{name}: must be {wanted}", parameter=name)


async def openai_app(guarded: GuardedLLM, info: EngineInfo, name: str) -> ASGIApp:
    """vLLM's `/v1/models`, `/v1/completions` and `/v1/chat/completions`.

    Args:
        guarded: what samples.
        info: of the engine.
        name: by which requests call the model.
    """
    checks = [Depends(check_body)]
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, dependencies=checks)
    for attach in (attach_models, attach_completions, attach_chat):
        attach(app)
    init_exception_handler(app)
    # In place of vLLM's handler, which would stop vLLM's server; ours looks after the process itself.
    for kind in (EngineDeadError, EngineGenerateError):
        app.add_exception_handler(kind, _engine_failed)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model, args.served_model_name = info.model, [name]
    await init_app_state(guarded, app.state, args, ("generate",))
    return app


async def _engine_failed(request: Request, error: Exception) -> JSONResponse:
    dead = isinstance(error, EngineDeadError)
    status = HTTPStatus.SERVICE_UNAVAILABLE if dead else HTTPStatus.INTERNAL_SERVER_ERROR
    message = f"the engine failed: {error.__cause__ or error}"
    body = create_error_response(GracefulHTTPError(message, status))
    return JSONResponse(body.model_dump(), status_code=status)
