"""vLLM's two entry points into this package."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any


def register() -> None:
    """`vllm.general_plugins`: runs in every process of vLLM, possibly more than once."""
    from vllm_lego._vllm import install_worker_patches  # noqa: PLC0415  after vLLM's own imports

    install_worker_patches()


class LegoEndpoints:
    """`vllm.endpoint_plugins`: runs in each API server, when `VLLM_PLUGINS` names it."""

    name = "lego"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the management routes and put the interception around all routes."""
        from vllm_lego._vllm import wrap_router  # noqa: PLC0415
        from vllm_lego.interception import Interception  # noqa: PLC0415
        from vllm_lego.openapi import extend_openapi  # noqa: PLC0415
        from vllm_lego.routes import attach  # noqa: PLC0415

        attach(app)
        extend_openapi(app)

        def wrap(routes: Any) -> Interception:
            self._interception = Interception(routes)
            return self._interception

        wrap_router(app, wrap)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start serving sets, once the engine is up.

        Raises:
            SettingsError: a `VLLM_LEGO_` variable makes no sense.
        """
        from vllm_lego._vllm import Engine, api_keys, has_lora  # noqa: PLC0415
        from vllm_lego.metrics import Metrics  # noqa: PLC0415
        from vllm_lego.service import LegoService  # noqa: PLC0415
        from vllm_lego.settings import Settings  # noqa: PLC0415

        settings = Settings.from_environment(os.environ)
        if engine_client is not None and has_lora(state):
            state.lego = LegoService(Engine(engine_client, state), settings, Metrics())
        self._interception.start(state.lego, settings.max_body_bytes, api_keys(args))
