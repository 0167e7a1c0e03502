#!/usr/bin/env bash
# `docker compose up --build` for real: builds both images, starts the quickstart job, asks both servers for trees
# from outside before and after training, waits for the trainer's table, copies the run folder out, removes everything.
#
#   tests/docker/compose.sh                                         the whole job, as a user would run it
#   SPOKE_SET="trainer.steps=2" tests/docker/compose.sh             a short one: settings for the trainer
#
# KEEP_RUN=FOLDER keeps the run folder there. TRAINER_TIMEOUT: seconds (1500). Without a Docker engine,
# ../shared/tools/docker-engine starts one, where that exists.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
say() { echo "compose.sh: $*"; }

started_engine=""
if ! docker info >/dev/null 2>&1; then
  [ -x ../shared/tools/docker-engine ] || { say "no Docker engine answers" >&2; exit 2; }
  say "starting a Docker engine"
  eval "$(../shared/tools/docker-engine start)"
  started_engine=yes
fi

# A project, ports and volumes of its own, so that nothing of a user's is touched.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
export COMPOSE_PROJECT_NAME="spoke-test-$$" SPOKE_PORT_1="${SPOKE_PORT_1:-$(free_port)}" SPOKE_PORT_2="${SPOKE_PORT_2:-$(free_port)}"
for setting in ${SPOKE_SET:-}; do SPOKE_TRAIN_ARGS="${SPOKE_TRAIN_ARGS:-} --set $setting"; done
export SPOKE_TRAIN_ARGS="${SPOKE_TRAIN_ARGS:-}"
out="${KEEP_RUN:-$(mktemp -d)}"
mkdir -p "$out"

finish() {
  local code=$?
  [ "$code" = 0 ] || { say "failed ($code); the end of each log:"; docker compose ps -a; docker compose logs --tail 40; } || true
  docker compose down --volumes --remove-orphans --timeout 10 >/dev/null 2>&1 || true
  [ -n "${KEEP_RUN:-}" ] || rm -rf "$out"
  [ -z "$started_engine" ] || ../shared/tools/docker-engine stop || true
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Both servers answer for themselves, with weights of at least version $1.
ask_servers() {
  local port
  for port in "$SPOKE_PORT_1" "$SPOKE_PORT_2"; do python3 tests/docker/rollout.py "http://127.0.0.1:$port" "$1"; done
}

say "building"
docker compose build >"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }
say "starting Redis and the servers"
docker compose --progress quiet up -d --wait --wait-timeout 300 redis server-1 server-2
say "trees from both servers, before training"
ask_servers 0

say "starting the trainer: ${SPOKE_TRAIN_ARGS:-as configured}"
docker compose --progress quiet up -d trainer
code=0
timeout "${TRAINER_TIMEOUT:-1500}" docker compose wait trainer >/dev/null || code=$?
docker compose logs --no-log-prefix trainer
[ "$code" = 0 ] || { say "the trainer's exit code is $code (124: not done in time)"; exit 1; }

docker compose cp trainer:/runs/quickstart "$out/quickstart"
say "run folder:"
(cd "$out/quickstart" && find . -type f | sort | head -50)
steps="$(wc -l <"$out/quickstart/metrics.jsonl")"
[ "$steps" -gt 0 ] || { say "metrics.jsonl is empty"; exit 1; }
say "trees from both servers, with the weights of the trainer's last step ($steps)"
ask_servers "$steps"
say "passed"
