"""The shapes that are merged: random LoRAs on the projections of Llama models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lego_core import LoraAdapter, LoraModule

MODELS = {
    # hidden, intermediate, key and value width, layers
    "tiny": (64, 96, 32, 2),
    "1B": (2048, 8192, 512, 16),
    "8B": (4096, 14336, 1024, 32),
    "70B": (8192, 28672, 1024, 80),
}


@dataclass(frozen=True, slots=True)
class Case:
    """T adapters of one rank on all seven projections, merged into rank k."""

    model: str = "8B"
    adapters: int = 3
    rank: int = 16
    k: int = 16
    layers: int = 0
    """0: as many as the model has."""

    @property
    def name(self) -> str:
        """What tables call it."""
        layers = f", {self.layers} layers" if self.layers else ""
        return f"{self.model}{layers}, {self.adapters} x rank {self.rank}, k {self.k}"

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return [in_features, out_features] by projection."""
        hidden, wide, kv, _ = MODELS[self.model]
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, wide),
            "mlp.up_proj": (hidden, wide),
            "mlp.down_proj": (wide, hidden),
        }

    @property
    def n_layers(self) -> int:
        """Layers that are merged."""
        return self.layers or MODELS[self.model][3]

    @property
    def n_modules(self) -> int:
        """Modules that are merged."""
        return self.n_layers * len(self.shapes())

    def pool_bytes(self, itemsize: int = 2) -> int:
        """Size of all members' weights."""
        width = sum(sum(shape) for shape in self.shapes().values())
        return self.n_layers * width * self.adapters * self.rank * itemsize

    def build(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[LoraAdapter]:
        """Draw the adapters. Each has a digest, as one that was loaded has."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            LoraAdapter(
                f"adapter-{i}",
                {
                    f"model.layers.{layer}.{name}": LoraModule(
                        *(
                            torch.randn(
                                shape, generator=generator, device=device, dtype=torch.float32
                            )
                            .mul_(0.02)
                            .to(dtype)
                            for shape in ((self.rank, wide), (high, self.rank))
                        ),
                        2.0,
                    )
                    for layer in range(self.n_layers)
                    for name, (wide, high) in self.shapes().items()
                },
                digest=f"{i:064d}",
            )
            for i in range(self.adapters)
        ]


def around(base: Case) -> list[Case]:
    """One thing varied at a time, the base case first."""
    cases = [
        base,
        *(replace(base, adapters=n) for n in (2, 4, 6, 8)),
        *(replace(base, rank=rank) for rank in (8, 32, 64)),
        *(replace(base, k=k) for k in (8, 32, 64)),
        *(replace(base, model=model) for model in ("1B", "70B") if base.model == "8B"),
    ]
    return list(dict.fromkeys(cases))
