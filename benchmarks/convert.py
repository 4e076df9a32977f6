"""How fast folders of Hugging Face's are imported and exported, and in how much memory.

    python benchmarks/convert.py [--model lfm2_1_2b] [--shard 500] [--folder DIR]

Makes a folder of random bfloat16 tensors in shards of so many MB, then imports and exports it, each in a process of its
own: seconds until all is on the disk, GB/s of tensors, seconds of a core, and the process's largest memory beyond what
it has before (pages of mapped files apart). Beside it the disk's own speed: the same files copied.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GB = 1e9


def make(name: str, folder: Path, shard_bytes: int) -> None:
    import torch

    from mambadsl.build.shards import Unit, blank, save_shards
    from mambadsl.compile import load
    from mambadsl.files import MODELS
    from mambadsl.graph.weights import all_weights
    from mambadsl.hf.exporter import export_settings

    graph = load(MODELS / f"{name}.mdl").layers
    settings, found = export_settings(graph)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(settings.config.to_json_string(use_diff=False), encoding="utf-8")
    shapes = {
        name: shape for path, weight in all_weights(graph).items() for name, shape in found.places[path].shapes(weight)
    }

    def one(name: str, shape: tuple[int, ...]) -> list:
        return [(name, [torch.empty(shape, dtype=torch.bfloat16).normal_()])]

    units = [
        Unit({name: blank(shape, torch.bfloat16)}, lambda name=name, shape=shape: one(name, shape))
        for name, shape in sorted(shapes.items())
    ]
    save_shards(
        folder, "model", units, index="model.safetensors.index.json", about={"format": "pt"},
        max_file_bytes=shard_bytes,
    )


class Anonymous(threading.Thread):
    """The process's largest memory that is not a mapped file, sampled."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.most = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.02)


def work(what: str, folder: Path, scratch: Path) -> dict:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from mambadsl.hf.folder import export_hf, import_hf

    memory, start, cpu = Anonymous(), time.monotonic(), time.process_time()
    if what == "import":
        import_hf(folder, weights=scratch / "ours")
    elif what == "export":
        export_hf(import_hf(folder).program, scratch / "again", weights=scratch / "ours")
    else:
        shutil.copytree(folder, scratch / "copied")
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(scratch / "copied", ignore_errors=True)
    return {
        "seconds": seconds, "cpu": time.process_time() - cpu, "memory": memory.most - memory.first,
        "all_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lfm2_1_2b")
    parser.add_argument("--shard", type=int, default=500, help="MB of a file")
    parser.add_argument("--folder", type=Path, help="for all the files (default: a temporary one)")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        what, folder, scratch = args.work
        print(json.dumps(work(what, Path(folder), Path(scratch))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "theirs"
        make(args.model, folder, args.shard * 10**6)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        files = len(list(folder.glob("*.safetensors")))
        print(f"{args.model}: {size / GB:.2f} GB in {files} files")
        for what in "copy", "import", "export":
            command = [sys.executable, __file__, "--work", what, str(folder), scratch]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(
                f"{what:7} {found['seconds']:6.2f} s  {size / GB / found['seconds']:5.2f} GB/s  "
                f"cpu {found['cpu']:6.2f} s  "
                f"memory {found['memory'] / GB:.2f} GB, with mapped files {found['all_memory'] / GB:.2f} GB"
            )


if __name__ == "__main__":
    main()
