"""Checkpoints as torch writes them, in every format that it can write, and exploits in its formats.

python3.11 torch_files.py DIR      with torch on its path; tests call `write_all`
"""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict

from . import components

# File -> what hfship says of it.
Said = Dict[str, str]


def write_all(folder: Path) -> Said:
    """Have torch write all files into a folder; what is said of each. Skips without torch."""
    site = components.require_torch()
    script = Path(__file__).resolve()
    components.run(
        [str(components.python311()), "-m", "support.torch_files", str(folder)],
        env={**os.environ, "PYTHONPATH": f"{site}:{script.parent.parent}"},
    )
    said: Said = json.loads((folder / "said.json").read_text())
    return said


class Exploit:
    """What runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _write(folder: Path) -> Said:
    import torch
    from torch import nn

    layer = nn.Linear(4, 3)
    weights = {
        "state": layer.state_dict(),
        "parameter": nn.Parameter(torch.ones(2)),
        "kinds": [torch.zeros(2, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.bool)],
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "type": torch.float16,
        "words": ["x", 1, 2.5, None, True, b"bytes", {1, 2}, 10**30],
        "meta": torch.zeros(2, device="meta"),
    }
    from torch._weights_only_unpickler import _get_allowed_globals

    (folder / "allowed.json").write_text(json.dumps(list(_get_allowed_globals())))
    said = {}

    def save(name: str, value: Any, text: str, **how: Any) -> None:
        torch.save(value, folder / name, **how)
        said[name] = text

    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    only = "weights only"
    for protocol in (2, 3, 4, 5):
        save(f"zip{protocol}.pt", weights, only, pickle_protocol=protocol)
        how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
        save(f"old{protocol}.bin", weights, only, **how)
        save(f"old_exploit{protocol}.bin", {"a": Exploit()}, "imports posix.system", **how)
    save("optimizer.pt", optimizer.state_dict(), only)
    save("one.pth", torch.ones(3), only)
    save("exploit.pt", {"a": Exploit(), "w": torch.ones(2)}, "imports posix.system")
    save("module.pt", layer, "imports torch.nn.modules.linear.Linear")
    (folder / "plain.pkl").write_bytes(pickle.dumps(torch.ones(2)))
    said["plain.pkl"] = "imports torch.storage._load_from_bytes"
    torch.jit.script(layer).save(str(folder / "script.pt"))
    said["script.pt"] = "imports __torch__.torch.nn"
    with torch.package.PackageExporter(str(folder / "package.pt")) as package:
        package.save_source_string("own", "print(1)")
        package.save_pickle("model", "weights.pkl", [1])
    said["package.pt"] = "imports code in package/own.py"
    with zipfile.ZipFile(folder / "nested.zip", "w") as outer:
        outer.write(folder / "exploit.pt", "inner.pt")
    said["nested.zip"] = "imports posix.system"
    _write_tar(folder, torch)
    said["tar.pt"] = only
    said["tar_exploit.pt"] = "imports posix.system"
    return said


def _write_tar(folder: Path, torch: Any) -> None:
    """What torch wrote before 0.1.10, by what its loader reads (legacy_load); no torch of today
    writes it."""
    import io
    import struct
    import tarfile

    def storages(kind: Any) -> bytes:
        numbers = struct.pack("<q2f", 2, 1.0, 2.0)
        key = pickle.dumps((1, "cpu", kind), 2)
        return pickle.dumps(1, 2) + key + numbers + pickle.dumps([], 2)

    tensor = pickle.dumps((7, 1, torch.FloatTensor), 2)
    tensors = pickle.dumps(1, 2) + tensor + struct.pack("<ii3q", 1, 0, 2, 1, 0)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return "7"
            return None

    def packed(value: Any) -> bytes:
        stream = io.BytesIO()
        Pickler(stream, 2).dump(value)
        return stream.getvalue()

    for name, value in (("tar.pt", [torch.ones(2)]), ("tar_exploit.pt", [Exploit()])):
        with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
            members = {
                "sys_info": pickle.dumps({"protocol_version": 1000}, 2),
                "pickle": packed(value),
                "storages": storages(torch.FloatStorage),
                "tensors": tensors,
            }
            for member, content in members.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    loaded = torch.load(folder / "tar.pt", weights_only=False)
    assert loaded[0].tolist() == [1.0, 2.0]  # it is the format that torch reads


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "said.json").write_text(json.dumps(_write(target)))
