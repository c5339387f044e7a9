"""vLLM's two entry points into this package."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "lego"

logger = logging.getLogger("vllm.lego")


def register() -> None:
    """`vllm.general_plugins`: runs in every process of vLLM, possibly more than once.

    Raises:
        SystemExit: it was asked for by name and cannot work; says why in one sentence.
    """
    with _ending_in_a_sentence():
        from vllm_lego._vllm import install_worker_patches  # noqa: PLC0415  after vLLM's own
        from vllm_lego.settings import Settings  # noqa: PLC0415

        Settings.from_environment(os.environ)
        install_worker_patches()


class LegoEndpoints:
    """`vllm.endpoint_plugins`: runs in each API server, when `VLLM_PLUGINS` names it."""

    name = NAME
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the management routes and put the interception around all routes."""
        from vllm_lego._vllm import wrap_router  # noqa: PLC0415
        from vllm_lego.access import Callers  # noqa: PLC0415
        from vllm_lego.interception import Interception  # noqa: PLC0415
        from vllm_lego.openapi import extend_openapi  # noqa: PLC0415
        from vllm_lego.routes import attach  # noqa: PLC0415

        attach(app)
        extend_openapi(app)

        def wrap(routes: Any) -> Callers:
            self._interception = Interception(routes)
            self._callers = Callers(self._interception)
            return self._callers

        with _ending_in_a_sentence():
            wrap_router(app, wrap)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start serving sets, once the engine is up.

        Raises:
            SystemExit: it cannot work; says why in one sentence.
        """
        from vllm_lego import tracing  # noqa: PLC0415
        from vllm_lego._vllm import Engine, api_keys, has_lora, makes_spans  # noqa: PLC0415
        from vllm_lego.access import Access  # noqa: PLC0415
        from vllm_lego.metrics import Metrics  # noqa: PLC0415
        from vllm_lego.policy import read_policy  # noqa: PLC0415
        from vllm_lego.service import LegoService  # noqa: PLC0415
        from vllm_lego.settings import Settings  # noqa: PLC0415

        with _ending_in_a_sentence():
            settings = Settings.from_environment(os.environ)
            keys = api_keys(args)
            access = Access(read_policy(settings), keys)
            if engine_client is not None and has_lora(state):
                engine = Engine(engine_client, state)
                if makes_spans(state):
                    tracing.start()
                state.lego = LegoService(engine, settings, Metrics(), access)
                engine.before_shutdown(state.lego.drain)
                await state.lego.merged.show_tiers()
            if access.is_restricted:
                self._callers.access = access
            self._interception.start(state.lego, settings.max_body_bytes, keys)


@contextmanager
def _ending_in_a_sentence() -> Iterator[None]:
    """End the process, without a trace, where the operator has something to change.

    vLLM loads general plugins that nobody named too; such a one steps aside with a warning.
    """
    from vllm_lego.compatibility import UnsupportedVllmError  # noqa: PLC0415
    from vllm_lego.settings import SettingsError  # noqa: PLC0415

    try:
        yield
    except (SettingsError, UnsupportedVllmError) as error:
        if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
            raise SystemExit(f"vllm-lego: {error}") from None
        logger.warning("vllm-lego does nothing here: %s", error)
