"""How a run ends, whatever it is about: judged to the end or stopped, its report and certificate written, shown and heeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from lorakeet.errors import RunStopped
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.report import Report, write_report
from lorakeet.train.run import RunFolder
from lorakeet.workflows.finetuning.terminal import show_certificate, show_results
from lorakeet.workflows.runs.output_paths import writing


@contextmanager
def judging(run: RunFolder) -> Iterator[None]:
    """Ctrl-C in here, or what stands for it (train/processes), is a RunStopped that says what is whole and how to judge it."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise RunStopped(
            f"{str(stopped) or 'Ctrl-C'}: the training is done and {run.adapter} is whole, but it was not judged to the end. "
            f"Judge it with: {run.resume_command}"
        ) from None


def conclude(report: Report, certificate: Certificate, run: RunFolder, console: Console, *, remarks: Sequence[str] = ()) -> None:
    """Writes both into the run folder, prints them with `remarks` between, then the commands that may follow.

    Raises VerificationFailed if a check failed; nothing is recommended then.
    """
    with writing(f"The report in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
        certificate.write(run.certificate)
        write_report(report, run.path)
    show_results(report, console)
    for remark in remarks:
        console.print(remark)
    show_certificate(certificate, console)
    console.print(f"Report: {run.page}   Adapter: {run.adapter}   Certificate: {run.certificate}", soft_wrap=True)
    certificate.raise_if_failed()
    for item in report.next_commands:
        console.print(f"Next: {item.command}   ({item.purpose})", markup=False, highlight=False, soft_wrap=True)
