"""The management routes. They lie under `/v1`, which vLLM's API-key check guards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from vllm_lego import tracing
from vllm_lego.adapter_set import names_none, parse_adapters, shown
from vllm_lego.asgi import refusal
from vllm_lego.cache import CachedMerge
from vllm_lego.errors import BadRequestError, ServingError
from vllm_lego.interception import OWN_PREFIX
from vllm_lego.recipe import Recipe
from vllm_lego.request_body import parse, refuse_repeated
from vllm_lego.schema import (
    Adapter,
    Adapters,
    DroppedMerge,
    Error,
    Merge,
    MergeRequest,
    Merges,
    PreparedMerge,
)
from vllm_lego.service import LegoService

_ERRORS = {400: "a field makes no sense", 404: "nobody knows that name"}
_MERGING_ERRORS = _ERRORS | {
    403: "adapters that may not be combined",
    500: "the merge failed; the server's log says more",
    413: "the body is over the limit",
    422: "adapters that cannot be merged",
    503: "the merge queue is full; see Retry-After",
    504: "the merge took longer than the limit",
}
_DROPPING_ERRORS = _ERRORS | {
    409: "requests in flight use it",
    500: "the store keeps it; the server's log says more",
    503: "the server is shutting down",
    504: "it is still being written",
}

router = APIRouter(tags=["adapters"])


def attach(app: FastAPI) -> None:
    """Add the routes to vLLM's application, and what makes answers of their errors."""
    app.state.lego = None
    app.include_router(router)
    app.add_exception_handler(ServingError, _refused)


def _responses(errors: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    answers: dict[int | str, dict[str, Any]] = {401: {"description": "no or wrong API key"}}
    return answers | {code: {"description": why, "model": Error} for code, why in errors.items()}


@router.get(OWN_PREFIX, response_model_exclude_none=True, responses=_responses(_ERRORS))
async def list_adapters(request: Request) -> Adapters:
    """List the adapters that a request can name; one that cannot be merged says why."""
    service = _service(request)
    await service.catalog.refresh()
    here = [await _describe(service, name) for name in service.catalog.names()]
    absent = service.catalog.names_to_fetch()
    return Adapters(data=here + [Adapter(name=name, downloaded=False) for name in absent])


@router.get(OWN_PREFIX + "/merged", responses=_responses(_ERRORS))
async def list_merges(request: Request) -> Merges:
    """List the merges that need no merging and where they are, in no particular order."""
    merges = await _service(request).merges()
    return Merges(data=[Merge(**_described(tier, merge)) for tier, merge in merges])


@router.post(
    OWN_PREFIX + "/merge",
    responses=_responses(_MERGING_ERRORS),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/MergeRequest"}}
            },
        }
    },
)
async def merge(request: Request) -> PreparedMerge:
    """Merge a set ahead of traffic: the first request for it then is a hit."""
    service = _service(request)
    media_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if media_type.strip().lower() != "application/json":  # what a foreign web page can send
        raise BadRequestError(f"content-type is {shown(media_type)}; send application/json")
    fields = parse(await request.body())
    if fields is None:
        raise BadRequestError("the body must be a JSON object with `adapters`")
    refuse_repeated(fields)
    unknown = sorted(set(fields) - set(MergeRequest.model_fields))
    if unknown:
        raise BadRequestError(
            f"unknown field {shown(unknown[0])}; the fields are adapters, merge and model",
            param=unknown[0][:100],
        )
    model, adapters = fields.get("model"), fields.get("adapters")
    if model is not None and not (isinstance(model, str) and service.is_base_model(model)):
        raise BadRequestError(
            f"`model` is {shown(model)}; it must be the base model ({service.base_model!r}) or "
            "absent",
            param="model",
        )
    if names_none(adapters):
        raise BadRequestError("`adapters` names none; list those to merge", param="adapters")
    wanted = parse_adapters(
        adapters, fields.get("merge"), max_adapters=service.settings.max_adapters
    )
    result, merged, seconds = await service.prepare(wanted)
    return PreparedMerge(**_described("device", merged), result=result, seconds=seconds)


@router.delete(OWN_PREFIX + "/merged/{id}", responses=_responses(_DROPPING_ERRORS))
async def drop(id: str, request: Request) -> DroppedMerge:  # noqa: A002  the contract's name
    """Drop a merge from the device, host memory and the store.

    A later request for the same set makes it again. Other API servers of the same engine that
    serve it keep their copy on the device; `still_on_device` says so.
    """
    return DroppedMerge(id=id, still_on_device=await _service(request).drop(id))


def _described(tier: str, merge: CachedMerge) -> dict[str, Any]:
    recipe = Recipe.decode(merge.recipe)
    return {
        "id": recipe.merge_id,
        "members": [{"name": member.name, "weight": member.weight} for member in recipe.members],
        "method": recipe.config.method,
        "rank": recipe.config.rank,
        "merge": recipe.config.as_dict(),
        "bytes": merge.nbytes,
        "fidelity": merge.fidelity,
        "hits": merge.hits,
        "tier": tier,
    }


async def _describe(service: LegoService, name: str) -> Adapter:
    try:
        (entry,) = await service.catalog.look_up([name], param="adapters")
    except ServingError as error:
        return Adapter(name=name, error=str(error))
    return Adapter(
        name=name,
        rank=entry.config.rank,
        alpha=entry.config.alpha,
        target_modules=list(entry.config.target_modules),
        bytes=entry.nbytes,
        digest=entry.digest,
    )


def _service(request: Request) -> LegoService:
    service: LegoService | None = request.app.state.lego
    if service is None:
        raise BadRequestError("this server was started without --enable-lora")
    return service


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)  # noqa: S101  what it is registered for
    if request.method == "POST":  # the span is of it
        tracing.failed(error)
    service: LegoService | None = request.app.state.lego
    if service is not None:
        service.metrics.count_error(error.reason, named_a_set=request.method == "POST")
    return refusal(error)
