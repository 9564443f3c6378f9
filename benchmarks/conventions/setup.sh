#!/bin/sh
# Install the pinned packages that tests/test_speakers.py asks, without their dependencies on
# torch, into FOLDER:
#     sh benchmarks/conventions/setup.sh FOLDER
set -eu
folder=${1:?give a folder for the packages}
python -m pip install --quiet --no-deps --target "$folder" --requirement "$(dirname "$0")/requirements.txt"
