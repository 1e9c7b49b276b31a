"""Every architecture of the transformers library that builds from a shrunk configuration: loaded as `from_pretrained` loads it.

Not run by default: `python -m pytest tests/conformance/test_hub.py -m conformance`, five minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ..hub_models import small
from ..test_hub import assert_same, loaded, one_thread
from .architectures import types

__all__ = ["one_thread"]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.conformance]

LEFT_OUT = {
    "chinese_clip": "from_pretrained sets the padding token's row to zero after it has read it",
    "qwen2_5_omni": "its own from_pretrained reads a file with its speakers' voices besides",
    "jev": "its own from_pretrained gives no loading info",
    "kimi_k25": "the shrunk configuration's heads do not divide its width, and transformers cannot save it",
    "apertus": "from_pretrained reads its dtype as a string, and the constructor does not take one",
    "apertus1p5_text": "as apertus",
}


@pytest.mark.parametrize("model_type", [each for each in types("A", "z") if each not in LEFT_OUT])
def test_every_type(model_type: str, tmp_path: Path) -> None:
    try:
        model = small(model_type)
    except Exception as error:
        pytest.skip(f"no class of it builds here from a shrunk default configuration: {error}")
    directory = model.saved(tmp_path)
    reference, info = model.reference(directory)
    assert_same(loaded(model.build, directory), reference, set(info["missing_keys"]))
