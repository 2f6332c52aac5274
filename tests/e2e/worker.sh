#!/bin/sh
# What Beam's worker pool starts for each worker: the SDK harness, in the next of the network namespaces if there are
# any. Its process id goes to $WORKERS/worker_N.pid.
for argument; do
  case $argument in
    --id=*) export WORKER_ID="${argument#*=}" ;;
    --control_endpoint=*) export CONTROL_API_SERVICE_DESCRIPTOR="url: '${argument#*=}'" ;;
    --logging_endpoint=*) export LOGGING_API_SERVICE_DESCRIPTOR="url: '${argument#*=}'" ;;
  esac
done
echo $$ >"$WORKERS/$WORKER_ID.new" && mv "$WORKERS/$WORKER_ID.new" "$WORKERS/$WORKER_ID.pid"
set -- python -m apache_beam.runners.worker.sdk_worker_main
[ -z "$NAMESPACES" ] || set -- ip netns exec "$NAMESPACES$((${WORKER_ID#worker_} % 3))" "$@"
exec "$@" 2>>"$WORKERS/$WORKER_ID.log"
