"""Runs notebooks in one kernel, for test_notebooks: python notebook_worker.py JOBS.json.

A process of its own: sockets and event loops of nbclient stay out of the tests'. The kernel imports torch once, and forgets every
name between two notebooks. A job has the notebook's path, values of its parameters, the folder to run in, and where to write it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def prepared(job: dict[str, Any]) -> Any:
    """The notebook with the job's parameters, and a first cell that begins anew in the job's folder."""
    notebook = nbformat.read(job["notebook"], as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in job["parameters"].items())
    folder = Path(job["folder"])
    kernels = "from lorakeet.kernels.cpu.compile import why_not\nwhy_not()"  # once, from the cache of all
    begin = f"{kernels}\nimport os\nos.chdir({str(folder)!r}); os.environ['LORAKEET_CACHE'] = {str(folder / 'cache')!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n{begin}"))
    return notebook


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(Path(sys.argv[1]).with_name("socket")))
    manager.start_kernel(env={**os.environ, "TERM": "dumb"})
    try:
        for job in jobs:
            notebook = prepared(job)
            try:
                NotebookClient(notebook, km=manager, timeout=300).execute(reset_kc=True, cleanup_kc=False)
            except CellExecutionError as error:
                print(f"{job['notebook']}: {error}")
            nbformat.write(notebook, job["out"])
    finally:
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
