"""attnzoo doctor: versions, devices, packages, and which backends can run here and why not."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, print_tables


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--compile",
        action="store_true",
        help="first compile the backend `native` (windows, BigBird, indexed, kernels, gates) "
        "for this machine",
    )


def run(settings: Namespace) -> int:
    """Compile, if that is asked for, look around and print."""
    if settings.compile:
        from attnzoo.engines.native.library import compile_native

        compile_native()
    from attnzoo.report.doctor.doctor_tables import doctor_tables

    print_tables(doctor_tables())
    return 0


DOCTOR = Command(
    "doctor",
    "Print versions, devices, what is installed or missing, and which backends run here.",
    _arguments,
    run,
)
