"""The fields of requests and the answers of the management routes, as types that document them.

Requests are read by `adapter_set`, whose messages say more than a type can.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lego_core.config import MAX_RANK, MAX_RESTARTS, METHOD_NAMES, NORM_NAMES, SCALE_NAMES

MergeId = Annotated[str, Field(pattern="^lego-[0-9a-f]{16}$", examples=["lego-0123456789abcdef"])]


class WeightedAdapter(BaseModel):
    """One adapter of a set."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    weight: float = 1.0


class MergeOptions(BaseModel):
    """How to merge. An option left out takes the method's default; a method has no others."""

    model_config = ConfigDict(extra="forbid")

    method: Annotated[str, Field(json_schema_extra={"enum": list(METHOD_NAMES)})] = "lego"
    rank: Annotated[
        int | None, Field(ge=1, le=MAX_RANK, description="By default the server's.")
    ] = None
    balance: bool = True
    align_sign: bool = True
    parameter_reweighting: Annotated[str, Field(json_schema_extra={"enum": list(NORM_NAMES)})] = (
        "l2"
    )
    output_reweighting: bool = True
    restarts: Annotated[int, Field(ge=1, le=MAX_RESTARTS)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    normalize: bool = False
    scale: Annotated[str, Field(json_schema_extra={"enum": list(SCALE_NAMES)})] = "none"


class SetFields(BaseModel):
    """What every request with a `model` may carry besides vLLM's own fields."""

    adapters: Annotated[
        list[str | WeightedAdapter] | None,
        Field(
            description="Serve this request with these adapters merged. A bare name weighs 1. With "
            "it, `model` is the base model or absent. Empty is as absent.",
            examples=[["sql", {"name": "style", "weight": 0.5}]],
        ),
    ] = None
    merge: Annotated[
        MergeOptions | None, Field(description="How to merge `adapters`; the server's default.")
    ] = None


class MergeRequest(SetFields):
    """A set to be merged ahead of requests."""

    model_config = ConfigDict(extra="forbid")

    adapters: Annotated[
        list[str | WeightedAdapter],
        Field(min_length=1, examples=[["sql", {"name": "style", "weight": 0.5}]]),
    ]
    model: Annotated[str | None, Field(description="The base model, if given.")] = None


class Adapter(BaseModel):
    """An adapter that a request can name; one that cannot be merged says why."""

    name: str
    object: Literal["adapter"] = "adapter"
    rank: int | None = None
    alpha: float | None = None
    target_modules: list[str] | None = None
    bytes: int | None = None
    digest: str | None = None
    downloaded: Annotated[
        bool | None, Field(description="False for one of the hub whose files are not here yet.")
    ] = None
    error: str | None = None


class Merge(BaseModel):
    """A merge that needs no merging, and in which tier it is."""

    id: MergeId
    object: Literal["merged_adapter"] = "merged_adapter"
    members: list[WeightedAdapter]
    method: str
    rank: int
    merge: dict[str, Any]
    bytes: int
    fidelity: Annotated[float, Field(description="Cosine to the exact weighted sum.")]
    hits: Annotated[int, Field(description="Requests served from it since it was merged.")]
    tier: Literal["device", "host", "disk"]


class PreparedMerge(Merge):
    """A merge that is ready on the device now."""

    result: Literal["hit", "miss", "coalesced"]
    seconds: Annotated[
        dict[str, float],
        Field(description="By phase: queue, load, merge, total. Empty if it was ready."),
    ]


class DroppedMerge(BaseModel):
    """A merge that was dropped."""

    id: MergeId
    object: Literal["merged_adapter"] = "merged_adapter"
    deleted: Literal[True] = True
    still_on_device: Annotated[
        bool,
        Field(description="Another API server of this engine serves it, and still may."),
    ]


class Adapters(BaseModel):
    """All adapters that can be named."""

    object: Literal["list"] = "list"
    data: list[Adapter]


class Merges(BaseModel):
    """All merges that need no merging."""

    object: Literal["list"] = "list"
    data: list[Merge]


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail
