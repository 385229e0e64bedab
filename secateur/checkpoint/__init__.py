"""Files: the pruned network with its plan in one safetensors file, plain state dicts, and atomic writing.

Nothing here unpickles foreign objects, and nothing leaves a half-written file under the name that was asked for.
"""

from secateur.checkpoint.atomic import write_atomic, write_json
from secateur.checkpoint.pruned import Header, is_checkpoint, load, read_header, save
from secateur.checkpoint.weights import load_weights

__all__ = [
    "Header",
    "is_checkpoint",
    "load",
    "load_weights",
    "read_header",
    "save",
    "write_atomic",
    "write_json",
]
