#!/usr/bin/env bash
# Downloads the Python packages that a machine with torch and Triton but no internet may lack, as wheels beside the
# checkout: `make gpu-check` there installs those that it needs. About 15 MB; torch, Triton and numpy are not among them.
#
#   deploy/gpu/wheels.sh [PYTHON_VERSION_THERE=3.12] [FOLDER=wheels]
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
folder=${2:-wheels}
python=${PYTHON:-python3}

platforms=()
for tag in manylinux1 manylinux2014 manylinux_2_{5,12,17,24,26,27,28,31,34,35}; do
  platforms+=(--platform "${tag}_x86_64") # pip takes each of them literally
done
mapfile -t wanted < <("$python" benchmarks/gpu_packages.py)
mkdir -p "$folder"
"$python" -m pip download --quiet --only-binary=:all: --implementation cp --python-version "$version" \
  "${platforms[@]}" --dest "$folder" "${wanted[@]}"
du -sh "$folder"
