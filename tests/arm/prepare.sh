#!/bin/sh
# A 64-bit ARM Debian with Python and torch, for `make arm`: prepare.sh FOLDER TORCH_SPEC, with the names of packages on
# standard input. It installs nothing on this machine. FOLDER/root holds Debian's files and FOLDER/site the packages.
set -e
folder=$1 torch=$2

for tool in debootstrap qemu-aarch64-static aarch64-linux-gnu-g++; do
	command -v $tool >/dev/null || { echo "make arm: there is no $tool; run: apt-get install debootstrap \
qemu-user-static g++-aarch64-linux-gnu"; exit 1; }
done

# The first stage runs nothing of what it unpacks, which is Debian's base; the rest is unpacked here.
rm -rf "$folder/root" "$folder/site"
mkdir -p "$folder"
debootstrap --arch=arm64 --foreign --variant=minbase --include=python3.11,libpython3.11-dev,libstdc++6,libgomp1 \
	bookworm "$folder/root"
for package in "$folder"/root/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$folder/root"; done

# What a process reads of its processor: qemu looks for files in its root first. torch wants to know the model.
mkdir -p "$folder/root/sys/devices/system/cpu/cpu0/regs/identification" "$folder/root/proc"
printf 'processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n' \
	>"$folder/root/proc/cpuinfo"
(
	cd "$folder/root/sys/devices/system/cpu"
	echo 0 | tee possible present kernel_max >/dev/null
	echo 0x411fd401 >cpu0/regs/identification/midr_el1
)

packages="${PYTHON:-python3} -m pip install -q --no-compile --target $folder/site --platform manylinux_2_28_aarch64 \
	--platform manylinux2014_aarch64 --python-version 3.11 --only-binary=:all:"
$packages --no-deps "$torch"
xargs $packages

# The torch for ARM on PyPI is built with CUDA, whose libraries take gigabytes; no CPU kernel calls them. In their place
# come libraries whose functions all return cudaErrorNoDevice.
libraries=$folder/site/torch/lib
[ -e "$libraries/libtorch_cuda.so" ] || exit 0
cd "$libraries"
{
	echo .text
	aarch64-linux-gnu-nm -D --undefined-only ./*.so | sed -n 's/^ *U \([^@]*\).*/\1/p' |
		grep -E '^(__cuda|cu|nccl|nv)' | sort -u | sed 's/.*/.globl &\n&:/'
	echo 'mov w0, 100'
	echo 'ret'
} >no_device.s
for name in $(aarch64-linux-gnu-readelf -d ./*.so | sed -n 's/.*NEEDED.*\[\(lib.*\)\]/\1/p' |
	grep -E '^lib(cu|nccl|nvrtc|nvshmem_host)' | sort -u); do
	case $name in libnvshmem*) symbols=NVSHMEM ;; *) symbols=$name ;; esac
	echo "$symbols { global: *; };" >symbols.map
	aarch64-linux-gnu-gcc -shared -nostdlib -Wl,-soname,"$name" -Wl,--version-script,symbols.map -o "$name" no_device.s
done
