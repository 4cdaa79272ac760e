"""Rows of many runs are one page: a run replaces its own rows and no others."""

import json

from benchmarks import kernel_page, kernel_report


def test_a_run_replaces_its_rows_and_keeps_the_others(tmp_path):
    memory = {"arguments": 3 << 20, "results": 1 << 20}
    row = {"op": "flash", "chip": "v5e", "program": "forward", "kernel": "flash_forward", "VMEM": 2048, "SMEM": 1024,
           "HBM in": 1 << 20, "HBM out": 1 << 20, **memory, "seconds": 1.0}  # fmt: skip
    page = tmp_path / "kernels"
    for tokens, temp in ((32768, 5 << 20), (131072, 9 << 20), (131072, 7 << 20)):
        options = kernel_report.Tpu(tokens=tokens)
        kernel_page.keep(page, "tpu", options, [row | {"temp": 8 << 20, "temp, layouts free": temp}])
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert [(r["tokens"], r["temp, layouts free"]) for r in rows] == [(32768, 5 << 20), (131072, 7 << 20)]
    text = (tmp_path / "kernels.md").read_text()
    assert "| flash | v5e | forward | flash_forward | 2 KiB | 1 KiB | 1 MiB | 1 MiB | 8 MiB | 7 MiB |" in text
    assert "| flash | 128 | forward | v5e | 4 + 5 MiB | 4 + 7 MiB |" in text
