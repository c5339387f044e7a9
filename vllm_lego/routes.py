"""The management routes. They lie under `/v1`, which vLLM's API-key check guards."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from vllm_lego.cache import CachedMerge
from vllm_lego.errors import BadRequestError, ServingError
from vllm_lego.interception import OWN_PREFIX
from vllm_lego.recipe import Recipe
from vllm_lego.service import LegoService

router = APIRouter(tags=["adapters"])


@router.get(OWN_PREFIX)
async def list_adapters(request: Request) -> JSONResponse:
    """List the adapters that a request can name; one that cannot be merged says why."""
    service = _service(request)
    if isinstance(service, JSONResponse):
        return service
    await service.catalog.refresh()
    here = [await _describe(service, name) for name in service.catalog.names()]
    absent = service.catalog.names_to_fetch()
    return _listing(here + [{"name": n, "object": "adapter", "downloaded": False} for n in absent])


@router.get(OWN_PREFIX + "/merged")
async def list_merges(request: Request) -> JSONResponse:
    """List the merges that need no merging and where they are, in no particular order."""
    service = _service(request)
    if isinstance(service, JSONResponse):
        return service
    return _listing([_described(tier, merge) for tier, merge in await service.merges()])


def _described(tier: str, merge: CachedMerge) -> dict[str, Any]:
    recipe = Recipe.decode(merge.recipe)
    return {
        "id": recipe.merge_id,
        "object": "merged_adapter",
        "members": [{"name": member.name, "weight": member.weight} for member in recipe.members],
        "method": recipe.config.method,
        "rank": recipe.config.rank,
        "merge": recipe.config.as_dict(),
        "bytes": merge.nbytes,
        "fidelity": merge.fidelity,
        "hits": merge.hits,
        "tier": tier,
    }


async def _describe(service: LegoService, name: str) -> dict[str, Any]:
    try:
        (entry,) = await service.catalog.look_up([name], param="adapters")
    except ServingError as error:
        return {"name": name, "object": "adapter", "error": str(error)}
    return {
        "name": name,
        "object": "adapter",
        "rank": entry.config.rank,
        "alpha": entry.config.alpha,
        "target_modules": list(entry.config.target_modules),
        "bytes": entry.nbytes,
        "digest": entry.digest,
    }


def _service(request: Request) -> LegoService | JSONResponse:
    service: LegoService | None = request.app.state.lego
    if service is not None:
        return service
    error = BadRequestError("this server was started without --enable-lora")
    return JSONResponse(error.body(), status_code=error.status)


def _listing(data: list[dict[str, Any]]) -> JSONResponse:
    return JSONResponse({"object": "list", "data": data})
