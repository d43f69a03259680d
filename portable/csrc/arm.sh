#!/usr/bin/env bash
# Cross-compiles the stand-alone checks of the kernels for 64-bit ARM and runs them under qemu-user: on processors without
# products of bytes, with SDOT, and with SMMLA too; then once more with the address and undefined-behaviour sanitizers. Leaks
# are not looked for, as that takes ptrace, which qemu-user has not.
#
#     portable/csrc/arm.sh [BUILD_FOLDER]
#
# Needs CMake, aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu) and qemu-aarch64 7.1 or newer (qemu-user).
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${1:-$source/build/arm}
export QEMU_LD_PREFIX=${QEMU_LD_PREFIX:-/usr/aarch64-linux-gnu} ASAN_OPTIONS=detect_leaks=0

# compile FOLDER ARGUMENTS_OF_CMAKE...
compile() {
    local folder=$1
    shift
    cmake -S "$source" -B "$folder" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
        -DNVTRIPY_PORTABLE_PYTHON=OFF -DNVTRIPY_PORTABLE_CHECK=ON -DCMAKE_BUILD_TYPE=Release "$@" >/dev/null
    cmake --build "$folder" --parallel "$(getconf _NPROCESSORS_ONLN)" >"$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
}

# check FOLDER PROCESSOR INSTRUCTION_SET...
check() {
    local folder=$1 processor=$2
    shift 2
    echo "$processor:"
    qemu-aarch64 -cpu "$processor" "$folder/check_kernels" "$@"
    qemu-aarch64 -cpu "$processor" "$folder/check_linear" 1 "$@"
}

compile "$build/plain" -DNVTRIPY_PORTABLE_WERROR=ON
check "$build/plain" cortex-a53 neon portable
check "$build/plain" neoverse-n1 dotprod
check "$build/plain" max i8mm

compile "$build/sanitized" -DNVTRIPY_PORTABLE_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1
echo "address,undefined:"
check "$build/sanitized" max i8mm dotprod neon
