#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine, to try job submissions. Jobs run as on a real cluster.
#
#     cluster/local.sh up           start it, and print how to use it
#     cluster/local.sh join NAME    start one more node
#     cluster/local.sh down         stop it, and nothing else
#
# Everything listens on 127.0.0.1 and requires a token: RAY_AUTH_TOKEN, or else the one in ~/.ray/auth_token, which is
# created if it does not exist. Environment variables:
#     CPUS        CPUs of each node (default: half of the machine's)
#     PORT        port of the cluster (6399)
#     DASHBOARD   port of the dashboard and the jobs API (8265)
#     DIRECTORY   its logs and process ids; must be yours (/tmp/corsa-cluster-<user>)
set -euo pipefail
umask 077

cores=$(getconf _NPROCESSORS_ONLN)
CPUS=${CPUS:-$((cores > 1 ? cores / 2 : 1))}
PORT=${PORT:-6399}
DASHBOARD=${DASHBOARD:-8265}
DIRECTORY=${DIRECTORY:-/tmp/corsa-cluster-$(id -un)}
export RAY_AUTH_MODE=token
export RAY_raylet_start_wait_time_s=60 # seconds that a node may take to register: Ray's ten are few on a busy machine
# The cluster that Ray's own actors ask for state. Without it, two clusters on one machine are mixed up.
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD

# Ray treats 127.0.0.1 as a name of the machine and listens on all its addresses, unless it is told that there is no other
# machine; then it refuses a second node. So all processes are told this, except the two that start a node.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
loopback='
import sys
from ray._private import ray_constants, services
from ray.scripts import scripts
from corsa.flow.starting import fixed_ports
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
with fixed_ports():  # else a raylet gives up after 15 s in which an agent has not reported its port
    sys.exit(scripts.main())
'

fail() { # MESSAGE
    echo "error: $1" >&2
    exit 1
}

own() { # checks that nobody else can have put a link, a process id or a log into the directory
    mkdir -m 700 "$DIRECTORY" 2>/dev/null || [ -d "$DIRECTORY" ] || fail "$DIRECTORY cannot be made: set DIRECTORY"
    local found
    found=$(stat -c '%F %u %a' "$DIRECTORY") # of a link itself, not of its target
    [ "$found" = "directory $(id -u) 700" ] ||
        fail "$DIRECTORY is not a directory of yours alone ($found): remove it, or set DIRECTORY to another"
    for found in "$DIRECTORY"/*.pid; do
        [ ! -e "$found" ] && [ ! -L "$found" ] && continue
        [ "$(stat -c '%F %u' "$found")" = "regular file $(id -u)" ] && [[ $(cat "$found") =~ ^[1-9][0-9]{0,9}$ ]] ||
            fail "$found holds no process id of this script's: look at it, and remove it"
    done
}

secret() { # the token's file, if there is one
    local file=$HOME/.ray/auth_token
    [ -n "${RAY_AUTH_TOKEN:-}" ] && return
    [ -e "$file" ] || ray get-auth-token --generate >/dev/null 2>&1
    [ "$(stat -Lc '%u %a' "$file")" = "$(id -u) 600" ] ||
        fail "$file can be read by others ($(stat -Lc '%U %a' "$file")): chmod 600 $file, or make a new one"
}

running() { # NAME: whether a process of its session (made by setsid) is alive
    [ -f "$DIRECTORY/$1.pid" ] && ps -o stat= -s "$(cat "$DIRECTORY/$1.pid")" | grep -qv '^Z'
}

start() { # NAME ARGUMENT...: starts a node and waits until it reports that it is up
    local name=$1
    shift
    : >"$DIRECTORY/$name.log"
    # Without --block, which stops a node as soon as one of its processes dies, even the dashboard.
    setsid bash -c 'python -c "$@" && exec sleep infinity' "$name" "$loopback" start --node-ip-address=127.0.0.1 \
        --num-cpus="$CPUS" --disable-usage-stats "$@" >"$DIRECTORY/$name.log" 2>&1 </dev/null &
    echo $! >"$DIRECTORY/$name.pid"
    for _ in $(seq 600); do
        sleep 0.2
        grep -q 'Ray runtime started' "$DIRECTORY/$name.log" && return
        running "$name" || break
    done
    echo "error: the $name did not start:" >&2
    cat "$DIRECTORY/$name.log" >&2
    down
    exit 1
}

end() { # NAME: stops its process and all that it has started
    running "$1" || return 0
    local session
    session=$(cat "$DIRECTORY/$1.pid")
    pkill -TERM -s "$session" || true
    for _ in $(seq 15); do # a raylet that cannot sign off from the others waits forever
        running "$1" || return 0
        sleep 0.2
    done
    pkill -KILL -s "$session" || true
}

up() {
    ! running head || fail "it is up already (process $(cat "$DIRECTORY/head.pid")): cluster/local.sh down ends it"
    secret
    start head --head --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD" \
        --ray-client-server-port="$((PORT + 1))" --temp-dir="$DIRECTORY/ray"
    join node
    cat <<END
two nodes of $CPUS CPUs, logs in $DIRECTORY
dashboard   http://127.0.0.1:$DASHBOARD   (its token: ray get-auth-token)
join it     RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:$PORT python pipelines/continual.py
submit      RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:$DASHBOARD --runtime-env cluster/runtime_env.yaml -- python pipelines/continual.py
end it      cluster/local.sh down
END
}

join() { # NAME
    # Each node has its own directory: nodes that share one remove the working directories of each other's jobs.
    start "$1" --address="127.0.0.1:$PORT" --temp-dir="$DIRECTORY/$1"
}

down() {
    local file
    for file in "$DIRECTORY"/*.pid; do
        [ "$(basename "$file" .pid)" = head ] || end "$(basename "$file" .pid)"
    done
    end head
    rm -f "$DIRECTORY"/*.pid
}

case ${1:-} in
up) own && up ;;
join)
    [[ ${2:-} =~ ^[A-Za-z0-9_-]+$ ]] || fail "a node's name has letters, digits, - and _: '${2:-}' does not"
    own && join "$2"
    ;;
down) [ ! -e "$DIRECTORY" ] && [ ! -L "$DIRECTORY" ] || { own && down; } ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac
