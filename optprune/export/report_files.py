"""The two files that tell of a run in its folder: report.json for programs, report.html for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optprune.measure.speed import file_bytes
from optprune.models import Decoder
from optprune.report import ModelSummary, PhaseReport, Report, joined, page, pictures
from optprune.report.reading import PAGE, REPORT
from optprune.system.files import write_whole


@dataclass(frozen=True)
class ReportFiles:
    """A report and what its page says beside it."""

    report: Report
    summary: ModelSummary
    drawn: Mapping[str, str]
    """the pictures, which are the same whatever saving takes"""

    @classmethod
    def of(cls, report: Report, decoder: Decoder, folder: Path, *, tokenizer: bool) -> "ReportFiles":
        """The files of a folder in which this model has been written."""
        summary = ModelSummary.of(decoder, report, file_bytes(str(folder)), tokenizer=tokenizer)
        return cls(report, summary, pictures(report))

    def put(self, folder: Path, phases: Sequence[PhaseReport]) -> Report:
        """Write both with more phases into a folder, in place of those that are there; returns the whole report."""
        whole = replace(self.report, phases=joined(self.report.phases, phases))
        texts = {REPORT: whole.to_json(), PAGE: page(whole, model=self.summary, drawn=self.drawn)}
        for name, text in texts.items():
            data = text.encode()
            write_whole(folder / name, lambda stream, data=data: stream.write(data), lasting=False)
        return whole
