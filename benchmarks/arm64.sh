#!/usr/bin/env bash
# An ARM64 Python 3.11 (that of Debian 12) with numpy and onnxruntime in a folder, for `qemu-aarch64 -L FOLDER FOLDER/usr/bin/python3.11`.
# Debian's packages are unpacked, not installed; `dpkg --add-architecture arm64` and `apt-get update` come before it.
set -euo pipefail
folder=$(realpath -m "$1") python=$PWD/$PYTHON
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libexpat1
libbz2-1.0 liblzma5 libffi8 libssl3 libcrypt1"
# shellcheck disable=SC2086
apt-get -qq -o APT::Sandbox::User=root download $(printf '%s:arm64 ' $packages)
for package in *.deb; do dpkg -x "$package" root; done
platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64)
version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)')
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
    "${platforms[@]}" --target root/usr/lib/python3/dist-packages "onnxruntime==$version" numpy flatbuffers packaging
# onnxruntime reads these to know its processor, and ends where it finds the host's
mkdir -p root/proc root/sys/devices/system/cpu
echo 0 | tee root/sys/devices/system/cpu/possible > root/sys/devices/system/cpu/present
printf '%s\n' 'processor : 0' 'Features : fp asimd atomics fphp asimdhp asimdrdm asimddp' 'CPU implementer : 0x41' \
    'CPU architecture: 8' 'CPU variant : 0x3' 'CPU part : 0xd0c' 'CPU revision : 1' '' > root/proc/cpuinfo
rm -rf "$folder"
mv root "$folder"
