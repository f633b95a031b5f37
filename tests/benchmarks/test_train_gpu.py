"""The GPU training benchmark runs both sides end to end, here on a CPU with a toy network."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks.torch_attention import register_causal_sdpa


@pytest.mark.slow
def test_both_sides_train_the_same_network(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--networks=toy", "--length=32"]
    command += ["--steps=2", "--notorch_compile", f"--out={out}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "toy" in text and "torch" in text
    report = json.loads(out.read_text())
    assert json.loads(text.splitlines()[-1]) == report
    (result,) = report["results"]
    ours, peer = result["ours"], result["torch"]
    # Neither Qwen v1 nor Qwen2 has a bias on the attention output: equal parameter counts.
    assert ours["parameters"] == peer["parameters"]
    for side in (ours, peer):
        assert abs(side["loss"] - math.log(512)) < 0.5  # both start from random weights
        assert side["tokens_per_second"] > 0 and side["mfu"] > 0
    assert result["speed_ratio"] > 0


def test_an_unknown_network_is_refused():
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--networks=gpt"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode and "'gpt' is none of qwen-1.8b" in run.stdout + run.stderr


@pytest.mark.slow
def test_peer_attention_equals_the_library_and_passes_no_mask():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    register_causal_sdpa()
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="causal_sdpa",
    )
    net = Qwen2ForCausalLM(config).float()
    tokens = torch.randint(0, 64, (2, 17))
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    got = torch.compile(lambda x: net(input_ids=x).logits, backend=keep)(tokens)
    net.config._attn_implementation = "sdpa"
    torch.testing.assert_close(got, net(input_ids=tokens).logits)
    # One graph, whose attention is causal by a flag instead of a mask, as flash kernels require.
    (graph,) = graphs
    calls = [n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(calls) == 2
    assert all(c.kwargs["is_causal"] and c.kwargs.get("attn_mask") is None for c in calls)
