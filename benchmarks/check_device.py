"""Take a run's model to a device: `python benchmarks/check_device.py DIR [--max-params 20k]`.

Picks a model of a finished run, exports it, and makes an empty virtual environment of onnxruntime
and numpy alone. There the copied script times the file, and README's example classifies the whole
test split. Fails unless every class is the PyTorch model's.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from evaluation.data.batches import batches
from evaluation.deploy.export import logits_of
from netsearch.members.saved import load_network
from run_pipeline import Pipeline

ROOT = Path(__file__).parent.parent
MARK = "<!-- example: load the exported file -->"
COMMAND = (sys.executable, str(ROOT / "run_pipeline.py"))


def run(*command: str, folder: Path | None = None) -> str:
    """Run a command and return what it printed; its errors go through."""
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Print one line per fact, and exit with 1 if the classes differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-params", default="20k")
    wanted = parser.parse_args()
    pick = (*COMMAND, "pick", str(wanted.folder), "--max-params", wanted.max_params, "--json")
    picked = json.loads(run(*pick))
    dataset = Pipeline.open(wanted.folder).dataset
    with tempfile.TemporaryDirectory() as name:
        device = Path(name)
        file = str(device / "model.onnx")
        print(run(*COMMAND, "export", str(wanted.folder), picked["id"], "--out", file).strip())
        run(sys.executable, "-m", "venv", str(device / "venv"))
        python = str(device / "venv" / "bin" / "python")
        run(python, "-m", "pip", "install", "-q", "onnxruntime", "numpy")
        shutil.copy(ROOT / "evaluation" / "cost" / "paretoblocks_latency.py", device)
        print(run(python, "-I", "paretoblocks_latency.py", ".", folder=device).strip())
        pixels = dataset.test.images.permute(0, 2, 3, 1).numpy()
        np.save(device / "images.npy", pixels[..., 0] if pixels.shape[3] == 1 else pixels)
        found = re.search(rf"{MARK}\s*```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        assert found is not None
        (device / "example.py").write_text(found[1])
        classes = run(python, "-I", "example.py", folder=device).splitlines()
    network, inputs = load_network(Path(picked["weights"]))
    with torch.no_grad():
        logits = torch.cat([logits_of(network, images) for images, _ in batches(dataset.test, 500)])
    expected = [inputs.class_names[index] for index in logits.argmax(1).tolist()]
    same = sum(a == b for a, b in zip(classes, expected, strict=True))
    print(f"{picked['id']}: the same class on {same} of {len(expected)} test images")
    sys.exit(0 if same == len(expected) else 1)


if __name__ == "__main__":
    main()
