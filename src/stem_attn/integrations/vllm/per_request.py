"""Quality per request: what a request says under `stem` in `extra_args`, over HTTP in `vllm_xargs`, is checked here.

`--logits-processors stem_attn.integrations.vllm.per_request:PerRequest` lets requests choose. It processes no logits: a
logits processor is what vLLM asks about a request's parameters before it admits the request, so that a wrong one is
answered with HTTP 400. The metadata builder reads the choice from the model runner.
"""

from __future__ import annotations

import json
import re
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from stem_attn.integrations.vllm.compat import VLLM_VERSION, V2LogitsProcessor, admitted, lacks
from stem_attn.integrations.vllm.settings import KEY, choose, settings_of


class PerRequest(LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]
    """Refuse requests whose choice is wrong, or that would share pages made with another choice.

    Raises:
        ValueError: Nobody can read a request's choice in this vLLM.
    """

    def __init__(self, *args: Any) -> None:
        absent = lacks("requests")
        if absent:
            raise ValueError(
                f"stem-attn cannot read what requests choose in this vLLM, {VLLM_VERSION} ({'; '.join(absent)}): start "
                "without --logits-processors"
            )

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check what a request asks for; see vLLM's `LogitsProcessor`.

        Raises:
            ValueError: Stem is not this server's backend, the choice is unknown, or the `cache_salt` does not name it.
        """
        asked = (sampling_params.extra_args or {}).get(KEY)
        found = admitted()
        if found is None:
            if asked is not None:
                raise ValueError(f"stem-attn cannot see this request's cache_salt in this vLLM, so {KEY!r} is refused")
            return
        vllm_config, salt = found
        settings = settings_of(vllm_config)
        if settings is None:
            if asked is not None:
                raise ValueError(f"{KEY!r} of a request needs a server with --attention-backend STEM")
            return
        choose(settings, asked)
        if vllm_config.cache_config.enable_prefix_caching:
            _check_salt(asked, salt)

    def is_argmax_invariant(self) -> bool:
        """Nothing is changed."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Keep nothing."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Leave a request's logits alone."""
        return False

    def apply(self, logits: Tensor, *context: Any) -> Tensor:
        """Return the logits as they are."""
        return logits


def _check_salt(asked: Any, salt: str | None) -> None:
    """Check that a request shares pages only with those of the same choice: its salt says which that is."""
    named = re.search(rf"(?:^|\s){KEY}=(\S*)$", salt or "")
    if asked is not None and (named is None or named[1] != str(asked)):
        raise ValueError(
            f"{{\"{KEY}\": {json.dumps(asked)}}} needs a cache_salt that ends in '{KEY}={asked}', got {salt!r}: prefix "
            "caching is on, and requests of one salt share keys and values"
        )
    if asked is None and named is not None:
        raise ValueError(f"the cache_salt {salt!r} is for requests with {KEY!r}: {named[1]!r}, and this one has none")
