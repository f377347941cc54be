"""Which objects the index of sharded tensors may hold, whichever Python wrote it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from regrow.checkpoint.sharded import _IndexUnpickler


class Attribute:
    """Pickled as `getattr(kind, name)`, as Python 3.11.0 to 3.11.3 do with enum members."""

    def __init__(self, kind: Any, name: str) -> None:
        self.of = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.of


def read(content: Any) -> Any:
    return _IndexUnpickler(io.BytesIO(pickle.dumps(content))).load()


@pytest.mark.parametrize("member", _MEM_FORMAT_ENCODING)
def test_a_memory_format_is_read_as_any_python_writes_it(member: _MEM_FORMAT_ENCODING) -> None:
    assert read(member) is read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member


@pytest.mark.parametrize("kind", [Metadata, _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT])
def test_no_other_attribute_is_looked_up(kind: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="getattr has no place in an index"):
        read(Attribute(kind, "__class__"))
