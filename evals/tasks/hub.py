"""The Hugging Face hub, where it can be reached; what is in its cache, where not."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within: without a network, data sets come from the cache or fail soon, instead of after minutes of retries."""
    import datasets
    from huggingface_hub import constants, get_session

    with ExitStack() as stack:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # whatever the HTTP client raises: no network, no name, a proxy that refuses
            stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield
