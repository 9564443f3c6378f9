"""attnzoo doctor: versions, devices, packages, and which backends can run here and why not."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, print_tables


def _no_arguments(parser: ArgumentParser) -> None:
    pass


def run(settings: Namespace) -> int:
    """Look around and print."""
    from attnzoo.report.doctor.doctor_tables import doctor_tables

    print_tables(doctor_tables())
    return 0


DOCTOR = Command(
    "doctor",
    "Print versions, devices, what is installed or missing, and which backends run here.",
    _no_arguments,
    run,
)
