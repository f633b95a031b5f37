"""The chat notebook runs from top to bottom without weights and prints the expected output."""

import os

import nbclient
import nbformat
import pytest

from tests.programs import ROOT


def printed(cell):
    """Returns stdout and the displayed text of an executed cell."""
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


@pytest.mark.slow
def test_notebook_runs_and_prints_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("QWEN_MODEL", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / "chat.ipynb", as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in codes), "outputs are not kept in the repository"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    three, facts, stream, several, probabilities, stats = map(printed, codes[2:])
    assert three.strip() and len(stream.strip()) > 5
    assert "chat model of 2 layers" in facts and "top_p=0.8" in facts and "Hello!" in facts
    assert several.count("→") == 3
    assert probabilities.count("most probable") == 6 and "6 out" in probabilities
    assert "6 requests" in stats
    assert os.listdir(tmp_path) == []
