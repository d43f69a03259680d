#!/usr/bin/env bash
# Builds the stand-alone checks of the kernels with the address, undefined-behaviour and thread sanitizers, and runs them.
#
#     portable/csrc/sanitize.sh [BUILD_FOLDER]
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${1:-$source/build/sanitize}
for sanitizers in address,undefined thread; do
    folder=$build/${sanitizers//,/-}
    # Which thread touches what does not depend on the instruction set: one is enough to look for races.
    only=$([[ $sanitizers == thread ]] && echo ON || echo OFF)
    cmake -S "$source" -B "$folder" -DNVTRIPY_PORTABLE_PORTABLE_ONLY="$only" -DNVTRIPY_PORTABLE_PYTHON=OFF -DNVTRIPY_PORTABLE_CHECK=ON \
        -DNVTRIPY_PORTABLE_SANITIZE="$sanitizers" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 >/dev/null
    cmake --build "$folder" --parallel "$(getconf _NPROCESSORS_ONLN)" >"$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
    echo "$sanitizers:"
    "$folder/check_kernels"
    "$folder/check_linear"
done
