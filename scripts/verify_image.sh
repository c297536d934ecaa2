#!/usr/bin/env bash
# Build docker/Dockerfile and use the image, as root on a Debian machine without a container engine; of the image with
# CUDA, build the wheel.
#
# buildah and debootstrap are installed where they are missing; the base has what python:3.11-slim-bookworm has.
# pip's variables of this shell (PIP_FIND_LINKS, PIP_CERT, ...) hold in the build, too; a path is mounted there.
# Usage: scripts/verify_image.sh
set -euo pipefail
cd "$(dirname "$0")/.."

if ! { command -v buildah && command -v debootstrap; } > /dev/null; then
  apt-get update --quiet --quiet
  apt-get install --quiet --quiet --yes --no-install-recommends buildah debootstrap
fi
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf --one-file-system "$TMPDIR"' EXIT
SECONDS=0
buildah=(buildah --root "$TMPDIR/root" --runroot "$TMPDIR/runroot" --storage-driver vfs)

echo "base: debootstrap"
debootstrap --variant=minbase --include=python3-venv,libpython3-dev bookworm "$TMPDIR/base" > "$TMPDIR/base.log" ||
  { tail "$TMPDIR/base.log"; exit 1; }
"${buildah[@]}" from --name base scratch > /dev/null
"${buildah[@]}" copy --quiet base "$TMPDIR/base" / > /dev/null
"${buildah[@]}" commit --quiet --rm base localhost/base > /dev/null
rm -rf --one-file-system "$TMPDIR/base"

echo "image: buildah build, after $SECONDS s"
mounts=()
echo "[global]" > "$TMPDIR/pip.conf"
while IFS='=' read -r name value; do
  name=${name#PIP_}
  name=${name//_/-}
  echo "${name,,} = $value" >> "$TMPDIR/pip.conf"
  if [[ $value == /* && -e $value ]]; then mounts+=(--volume "$value:$value:ro"); fi
done < <(env | grep '^PIP_' || true)
build() {
  "${buildah[@]}" build --isolation chroot --format docker --pull-never --build-arg BASE=localhost/base \
    --secret "id=pip.conf,src=$TMPDIR/pip.conf" "${mounts[@]}" --file docker/Dockerfile "$@" . \
    > "$TMPDIR/build.log" 2>&1 || { tail -n 60 "$TMPDIR/build.log"; exit 1; }
}
build --tag localhost/trimserve --build-arg REVISION="$(git rev-parse HEAD)"
built=$SECONDS
size=$("${buildah[@]}" images --format '{{.Size}}' localhost/trimserve)

echo "container: $size, after $built s"
"${buildah[@]}" from --name container localhost/trimserve > /dev/null
inside=("${buildah[@]}" run --isolation chroot container --)
image_says() {
  "${buildah[@]}" inspect --type image --format "{{range .Docker.Config.$1}}{{.}} {{end}}" localhost/trimserve
}
entrypoint=$(image_says Entrypoint)
healthcheck=$(image_says Healthcheck.Test) # CMD and its words

# shellcheck disable=SC2016  # the container's shell expands these
"${inside[@]}" sh -euc '
test "$(id -u)" != 0
touch "$HF_HOME/writable"
for tool in c++ cc cmake ninja; do if command -v "$tool"; then exit 1; fi; done'
# shellcheck disable=SC2086  # words
if "${inside[@]}" $entrypoint > "$TMPDIR/server.log" 2>&1 ||
  ! grep --quiet -- --allow-plaintext "$TMPDIR/server.log"; then
  echo "it should have asked for a certificate or for a word about plaintext"; cat "$TMPDIR/server.log"; exit 1
fi
# Without network namespaces the container's ports are this machine's: two below those that systems give to others.
port=$((20000 + RANDOM % 10000))
"${buildah[@]}" config --env TRIMSERVE__SERVER__ALLOW_PLAINTEXT=true --env "TRIMSERVE__SERVER__PORT=$port" \
  --env "TRIMSERVE__SERVER__METRICS_PORT=$((port + 1))" container
# In one shell, because buildah forwards no signals.
# shellcheck disable=SC2016
answer=$("${inside[@]}" sh -euc '
log=/tmp/server.log
$1 > "$log" 2>&1 &
server=$!
trap "kill $server; cat $log >&2" EXIT
attempts=0
until $2 2> /dev/null; do
  kill -0 "$server"
  attempts=$((attempts + 1))
  test "$attempts" -lt 120
  sleep 1
done
samples=$(python -c "import trimserve; print(trimserve.__path__[0])")/assets/samples
trimserve generate --address "127.0.0.1:$TRIMSERVE__SERVER__PORT" --image "$samples/scene.png" \
  --prompt "What do you see?"
kill -TERM "$server"
wait "$server"
grep --quiet stopped "$log"
trap - EXIT' sh "$entrypoint" "${healthcheck#CMD }")
echo "image: $size, built in $built s; is healthy, answered \"$answer\" and drained after $SECONDS s"

echo "image with CUDA: its wheel, after $SECONDS s"
# Against torch without CUDA: the gigabytes of the other one are all that is left out.
build --target wheel --tag localhost/cuda --build-arg DEVICE=cu130 \
  --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
"${buildah[@]}" from --name cuda localhost/cuda > /dev/null
"${buildah[@]}" run --isolation chroot cuda -- sh -c 'python -m zipfile --list /wheel/*.whl' | grep _ops_cuda
echo "image with CUDA: its wheel has the ops, after $SECONDS s"
