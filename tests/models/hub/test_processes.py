"""Two processes load one checkpoint over a mesh: each reads and holds its own shards."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.hub.test_files import GOLDEN, ROOT, big_checkpoint

LOAD = """
import json, sys, threading, time
from train import backend
backend.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jax, numpy as np
from safetensors.numpy import load_file
from models import hub
from models.hub import load
from train.sharding import make_mesh

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

mesh = make_mesh(data=1, fsdp=2)
small, _ = hub.from_pretrained(sys.argv[4], mesh=mesh)
stored = load_file(sys.argv[4] + "/model.safetensors")
kernel = small.params["layers"]["attn"]["q"]["kernel"]
for shard in kernel.addressable_shards:
    whole = np.stack([stored[f"model.layers.{i}.self_attn.q_proj.weight"].T for i in range(kernel.shape[0])])
    np.testing.assert_array_equal(shard.data, whole[shard.index])

read = 0
copy = load._copy
def counted(view, index, dtype):
    global read
    found = copy(view, index, dtype)
    read += found.nbytes
    return found

load._copy = counted
before, peak, over = anonymous(), 0, False
def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
bound, _ = hub.from_pretrained(sys.argv[3], mesh=mesh)
over = True
thread.join()
leaves = jax.tree.leaves(bound.params)
print(json.dumps(dict(parameters=sum(x.nbytes for x in leaves), read=read, grown=peak - before,
                      share=sum(s.data.nbytes for x in leaves for s in x.addressable_shards))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_each_process_reads_and_holds_its_share(tmp_path):
    largest = big_checkpoint(tmp_path / "big", 16, 384)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    folders = str(tmp_path / "big"), str(GOLDEN / "llama")
    runs = [subprocess.Popen([sys.executable, "-c", LOAD, address, str(n), *folders], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n in range(2)]  # fmt: skip
    for run in runs:
        out, error = run.communicate(timeout=200)
        assert run.returncode == 0, error[-2000:]
        found = json.loads(out.splitlines()[-1])
        assert found["parameters"] > 100e6 and found["read"] == found["share"] < 0.51 * found["parameters"], found
        assert found["grown"] <= found["share"] + 2 * largest + 28e6, (found, largest)
