"""The notebook runs from top to bottom, shows what it says, and is as it was last run."""

import ast
import base64
import io
import os
import re
import types

from conftest import ROOT
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest

import dbjax

PATH = ROOT / "launch" / "colab.ipynb"


def cells(notebook):
  """Its cells of code."""
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
  """The pictures that a cell shows, (H, W, 3) uint8 each."""
  found = [output["data"]["image/png"] for output in cell.outputs
           if "image/png" in output.get("data", {})]
  return [np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in found]


def check(notebook):
  """No cell has failed; each that draws has a picture, with something on it."""
  assert not [output for cell in cells(notebook) for output in cell.outputs
              if output.output_type == "error"]
  draws = [cell for cell in cells(notebook) if "dbjax.plots." in cell.source
           or "dbjax.pictures." in cell.source]
  assert len(draws) == 7
  for cell in draws:
    (picture,) = pictures(cell)
    ink = (picture != picture[0, 0]).any(-1)
    assert ink.mean() > 0.01 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, cell.source


def lines_of(picture):
  """How many of the blocks' colours a picture has."""
  colors = [tuple(int(dbjax.plots.color(b)[i:i + 2], 16) for i in (1, 3, 5)) for b in range(3)]
  return sum((picture == color).all(-1).sum() > 50 for color in colors)


def test_it_is_written_with_its_pictures():
  notebook = nbformat.read(PATH, 4)
  check(notebook)
  live = next(cell for cell in cells(notebook) if "display_id=True" in cell.source)
  assert lines_of(pictures(live)[0]) == 3  # the losses of all blocks
  assert PATH.stat().st_size < 800_000


def test_it_uses_the_public_names_alone():
  notebook = nbformat.read(PATH, 4)
  source = "\n".join(line for cell in cells(notebook) for line in cell.source.splitlines()
                     if not line.lstrip().startswith("%"))
  source = source.replace('is None:  # put the address of the repository here', 'is None: pass')
  names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
           and isinstance(node.value, ast.Name) and node.value.id == "dbjax"}
  assert names and names <= set(dbjax.__all__)


@pytest.mark.parametrize("devices", range(1, 9))
def test_its_three_blocks_divide_among_the_rows_of_its_mesh(devices):
  source = cells(nbformat.read(PATH, 4))[-1].source
  rows = eval(re.search("meshed.mesh.block = (.*)", source)[1],
              {"jax": types.SimpleNamespace(device_count=lambda: devices)})
  assert 3 % rows == 0 and devices % rows == 0


def test_a_cell_that_is_stopped_finds_its_workdir_again():
  training = next(cell for cell in cells(nbformat.read(PATH, 4)) if "dbjax.train" in cell.source)
  assert "mkdtemp" not in training.source


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = nbformat.read(PATH, 4)
  for cell in cells(notebook):
    cell.outputs = []
  nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                          resources={"metadata": {"path": str(tmp_path)}}).execute()
  check(notebook)
  assert "the same weights" in cells(notebook)[-1].outputs[0].text
