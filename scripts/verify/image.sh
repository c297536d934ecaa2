#!/usr/bin/env bash
# Build docker/Dockerfile and use the image, as root on a Debian machine without a container engine.
#
# buildah and debootstrap are installed where they are missing; the base has what python:3.11-slim-bookworm has.
# pip's variables of this shell (PIP_FIND_LINKS, PIP_CERT, ...) hold in the build, too; a path is mounted there.
# Usage: scripts/verify/image.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! { command -v buildah && command -v debootstrap; } > /dev/null; then
  apt-get update --quiet --quiet
  apt-get install --quiet --quiet --yes --no-install-recommends buildah debootstrap
fi
TMPDIR=$(mktemp -d)
export TMPDIR
server=
cleanup() {
  # What still runs would write where we remove.
  if [ -n "$server" ]; then kill "$server" && wait "$server"; fi 2> /dev/null || true
  rm -rf --one-file-system "$TMPDIR"
}
trap cleanup EXIT
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
"${buildah[@]}" build --isolation chroot --format docker --pull-never --build-arg BASE=localhost/base \
  --build-arg REVISION="$(git rev-parse HEAD)" --secret "id=pip.conf,src=$TMPDIR/pip.conf" "${mounts[@]}" \
  --file docker/Dockerfile --tag localhost/trimserve . > "$TMPDIR/build.log" 2>&1 ||
  { tail -n 60 "$TMPDIR/build.log"; exit 1; }
built=$SECONDS
size=$("${buildah[@]}" images --format '{{.Size}}' localhost/trimserve)

echo "container: $size, after $built s"
read -r port metrics_port < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))')
"${buildah[@]}" from --name container localhost/trimserve > /dev/null
# Without network namespaces the container's ports are this machine's.
"${buildah[@]}" config --env "TRIMSERVE__SERVER__PORT=$port" \
  --env "TRIMSERVE__SERVER__METRICS_PORT=$metrics_port" container
inside=("${buildah[@]}" run --isolation chroot container --)
image_says() {
  "${buildah[@]}" inspect --type image --format "{{range .Docker.Config.$1}}{{.}} {{end}}" localhost/trimserve
}
read -ra entrypoint <<< "$(image_says Entrypoint)"
read -ra healthcheck <<< "$(image_says Healthcheck.Test)" # CMD and its words

# shellcheck disable=SC2016  # the container's shell expands these
"${inside[@]}" sh -euc '
test "$(id -u)" != 0
touch "$HF_HOME/writable"
for tool in c++ cc cmake ninja; do if command -v "$tool"; then exit 1; fi; done'
if "${inside[@]}" "${entrypoint[@]}" > "$TMPDIR/server.log" 2>&1 || ! grep --quiet -- --allow-plaintext "$TMPDIR/server.log"; then
  echo "it should have asked for a certificate or for a word about plaintext"; cat "$TMPDIR/server.log"; exit 1
fi
"${buildah[@]}" config --env TRIMSERVE__SERVER__ALLOW_PLAINTEXT=true container
# shellcheck disable=SC2016
"${inside[@]}" sh -c 'echo $$ > /tmp/server.pid && exec "$@"' sh "${entrypoint[@]}" > "$TMPDIR/server.log" 2>&1 &
server=$!
for _ in $(seq 60); do
  if "${inside[@]}" "${healthcheck[@]:1}" > /dev/null 2>&1 || ! kill -0 "$server"; then break; fi
  sleep 1
done
"${inside[@]}" "${healthcheck[@]:1}" || { cat "$TMPDIR/server.log"; exit 1; }
samples=$("${inside[@]}" python -c 'import trimserve; print(trimserve.__path__[0])')/assets/samples
answer=$("${inside[@]}" trimserve generate --address "127.0.0.1:$port" --image "$samples/scene.png" \
  --prompt "What do you see?")
# buildah forwards no signals.
# shellcheck disable=SC2016
"${inside[@]}" sh -c 'kill -TERM "$(cat /tmp/server.pid)"'
wait "$server"
server=
grep --quiet stopped "$TMPDIR/server.log"
echo "image: $size, built in $built s; is healthy, answered \"$answer\" and drained after $SECONDS s"
