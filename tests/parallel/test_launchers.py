"""Process groups detected from SLURM, GKE and Cloud TPU VMs."""

from __future__ import annotations

import http.server
import threading

import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel.launchers import (
    ProcessGroup,
    detect_group,
    expand_hosts,
    explicit_group,
    tasks_per_node,
)

OFF = {"TPU_SKIP_MDS_QUERY": "1"}  # what jax sets on a machine without TPU chips


def slurm(**changes) -> dict[str, str]:
    return (
        OFF
        | {
            "SLURM_JOB_ID": "5000",
            "SLURM_STEP_NODELIST": "gpu[08-10]",
            "SLURM_STEP_NUM_TASKS": "24",
            "SLURM_STEP_TASKS_PER_NODE": "8(x3)",
            "SLURM_NODEID": "1",
            "SLURM_PROCID": "9",
            "SLURM_LOCALID": "1",
            "SLURMD_NODENAME": "gpu09",
        }
        | changes
    )


def test_without_a_launcher_there_is_no_group():
    assert detect_group(OFF) is None


def test_batch_script_without_srun_has_no_group():
    assert (
        detect_group(OFF | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    )


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("gpu[08-10,3],login", "gpu08 gpu09 gpu10 gpu3 login"),
        ("a[1-2]b[3-4]-x", "a1b3-x a1b4-x a2b3-x a2b4-x"),
        ("rack1-n[001],rack2-n[099-101]", "rack1-n001 rack2-n099 rack2-n100 rack2-n101"),
    ],
)
def test_node_lists_expand_as_scontrol_does(text, hosts):
    assert expand_hosts(text) == tuple(hosts.split())


@pytest.mark.parametrize("text", ["a[1-x]", "a[]", ""])
def test_malformed_node_list_is_refused(text):
    with pytest.raises(UserError, match="SLURM's node list"):
        expand_hosts(text)


def test_tasks_per_node_expands_repetitions():
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("8,banana") == []


def test_slurm_gives_address_index_hosts_and_device():
    hosts = ("gpu08",) * 8 + ("gpu09",) * 8 + ("gpu10",) * 8
    expected = ProcessGroup(
        "gpu08:62344", 24, 9, hosts, "SLURM", local_device=1
    )  # 61440 + 5000 % 4096
    assert detect_group(slurm()) == expected
    assert detect_group(slurm(JAX_COORDINATOR_PORT="99")).address == "gpu08:99"


def test_slurm_agrees_with_jax_on_address_and_numbers(monkeypatch):
    """Where jax detects SLURM by itself, it must come to the same three."""
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in slurm(SLURM_NTASKS="24").items():
        monkeypatch.setenv(name, value)
    jaxs = clusters.SlurmCluster
    assert jaxs.is_env_present()
    mine = detect_group()
    assert mine.address == jaxs.get_coordinator_address(1, None)
    assert (mine.count, mine.index) == (jaxs.get_process_count(), jaxs.get_process_id())
    assert mine.local_device == jaxs.get_local_process_id()


def test_only_task_of_a_node_drives_all_its_devices():
    alone = slurm(
        SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="1(x3)", SLURM_PROCID="1",
        SLURM_LOCALID="0",
    )  # fmt: skip
    assert detect_group(alone).local_device is None
    assert detect_group(alone).hosts == ("gpu08", "gpu09", "gpu10")
    # Also where the three settings are given by hand inside SLURM.
    assert explicit_group(("gpu08:1", 3, 1), alone).local_device is None
    assert explicit_group(("gpu08:1", 24, 9), slurm()).local_device == 1


def test_task_with_one_visible_gpu_drives_all_it_sees():
    assert detect_group(slurm(CUDA_VISIBLE_DEVICES="1")).local_device is None
    assert detect_group(slurm(CUDA_VISIBLE_DEVICES="0,1,2")).local_device == 1


def test_hosts_follow_cyclic_distribution_and_are_empty_for_unknown_layouts():
    cyclic = slurm(
        SLURM_DISTRIBUTION="cyclic", SLURM_STEP_NUM_TASKS="5", SLURM_STEP_TASKS_PER_NODE="2(x2),1",
        SLURM_PROCID="4", SLURM_NODEID="1",
    )  # fmt: skip
    assert detect_group(cyclic).hosts == ("gpu08", "gpu09", "gpu10", "gpu08", "gpu09")
    # What this node is called contradicts the layout: no names rather than wrong ones.
    assert detect_group(slurm(SLURMD_NODENAME="gpu10")).hosts == ()
    assert detect_group(slurm(SLURM_STEP_TASKS_PER_NODE="?")).hosts == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x' must be an integer"),
        ({"SLURM_PROCID": "24"}, "Process id 24 of 24 processes must be from 0 to 23"),
    ],
)
def test_contradictory_slurm_variables_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        detect_group(slurm(**change))


def test_gke_slice_gives_address_index_and_hosts():
    environment = OFF | {"TPU_WORKER_HOSTNAMES": "p-s-0-0.p,p-s-0-1.p", "TPU_WORKER_ID": "1"}
    group = detect_group(environment)
    assert (group.address, group.count, group.index) == ("p-s-0-0.p:8482", 2, 1)
    assert group.hosts == ("p-s-0-0.p", "p-s-0-1.p") and group.local_device is None


def test_single_gke_host_is_a_group_of_one():
    assert detect_group(OFF | {"TPU_WORKER_HOSTNAMES": "localhost"}).count == 1


def test_gke_workers_are_numbered_slice_by_slice():
    environment = OFF | {
        "TPU_WORKER_HOSTNAMES": "run-slice-1-0.run,run-slice-1-1.run",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "1",
    }
    group = detect_group(environment)
    assert (group.address, group.count, group.index) == ("run-slice-0-0.run:8482", 6, 3)
    assert group.hosts == tuple(f"run-slice-{s}-{w}.run" for s in range(3) for w in range(2))


def test_gke_indices_agree_with_jax(monkeypatch):
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,b",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    jaxs, mine = clusters.GkeTpuCluster, detect_group()
    assert mine.address == jaxs.get_coordinator_address(1, None)
    assert (mine.count, mine.index) == (jaxs.get_process_count(), jaxs.get_process_id()) == (4, 3)


METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "w0:0:10.0.0.1,w1:1:10.0.0.2",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nTPU_TOPOLOGY: '2x4'\n",
}


def test_tpu_vm_metadata_gives_the_workers():
    group = detect_group({}, read_metadata=METADATA.__getitem__)
    assert (group.address, group.count, group.index) == ("10.0.0.1:8482", 2, 1)
    assert group.hosts == ("10.0.0.1", "10.0.0.2")
    slices = METADATA | {
        "tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.9.9:8080'\n"
    }
    group = detect_group({}, read_metadata=slices.__getitem__)
    assert (group.address, group.count, group.index) == ("10.0.9.9:8482", 4, 3)
    assert group.hosts[0] == "worker 0 of slice 0" and group.hosts[3] == "10.0.0.2"


def test_machine_without_tpu_metadata_has_no_group():
    assert detect_group({}, read_metadata=lambda name: "") is None


class _Server(http.server.BaseHTTPRequestHandler):
    failures = 1

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        known = self.headers["Metadata-Flavor"] == "Google" and name in METADATA
        type(self).failures -= 1
        self.send_response(503 if self.failures >= 0 else 200 if known else 404)
        self.end_headers()
        if known and self.failures < 0:
            self.wfile.write(METADATA[name].encode())

    def log_message(self, *_):
        pass


def test_metadata_server_is_read_only_if_there_may_be_tpu_chips(monkeypatch):
    """With a server that is not ready at first."""
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        assert detect_group().hosts == ("10.0.0.1", "10.0.0.2")
        monkeypatch.setitem(METADATA, "agent-worker-number", "5")
        with pytest.raises(UserError, match="Process id 5 of 2 processes"):
            detect_group()
        monkeypatch.delitem(METADATA, "agent-worker-number")
        assert detect_group() is None
        server.shutdown()
