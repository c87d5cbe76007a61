#!/usr/bin/env bash
# Start Ray on the nodes of a Slurm allocation, run one job on it, and stop Ray after the job:
#   source .venv/bin/activate                       # environment with `ray` and scellst_ray
#   sbatch --nodes=4 cluster/slurm.sh python jobs/predict.py --config jobs/predict.yaml
# The environment and the folder must be on a filesystem that all nodes share. Flags of sbatch override
# the lines below; with --gpus-per-node=N each node offers N GPUs. If the same command is submitted
# again, it processes only what its run folder lacks.
#   SCELLST_HEAD_IP  address at which workers reach the head; default: the address of its name
#   SCELLST_PORT     first of two free ports on the head; default: computed from the job's number
#   SCELLST_TMPDIR   folder on a local disk of each node, at most 24 characters; Ray's files lie below
#                    it in a folder that is closed to other users; default: /tmp
#   SCELLST_WAIT_S   seconds to wait for all nodes; the job then starts with the nodes that are up;
#                    default: 300
#SBATCH --job-name=scellst-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch [FLAGS] cluster/slurm.sh python jobs/JOB.py [ARGUMENTS]" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?not a Slurm job: use sbatch}"

# Whether the folder is this user's alone. Its name can be foretold, so another user of the node may
# have made it. A node of a requeued job may have it from before.
is_private() {
  [[ -d $node_tmp && ! -L $node_tmp && -O $node_tmp && $(stat -c %a "$node_tmp" 2>/dev/null) == *00 ]]
}

# Run a node of the cluster in the foreground of its Slurm step. The function is sent to the nodes as
# text, because only the first node has the batch script.
ray_node() {
  # Ray would use the whole machine instead of the job's share.
  local limits=(--num-cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
  limits+=(--num-gpus="${SLURM_GPUS_ON_NODE:-0}")
  if [[ -n ${SLURM_MEM_PER_NODE:-} ]]; then
    local mebibyte=$((1024 * 1024))
    limits+=(--memory=$((SLURM_MEM_PER_NODE * mebibyte * 6 / 10)))
    limits+=(--object-store-memory=$((SLURM_MEM_PER_NODE * mebibyte * 2 / 10)))
  fi
  mkdir -p "${node_tmp%/*}"
  mkdir -m 700 "$node_tmp" 2>/dev/null || true
  if ! is_private; then
    echo "$node_tmp on $(hostname): it is no folder of mode 700 of user $(id -un); remove it, or set" \
      "SCELLST_TMPDIR to a folder of your own" >&2
    exit 1
  fi
  # Ray opens its own folder to all users, so it lies in a closed one.
  exec ray start "$@" "${limits[@]}" --temp-dir="$node_tmp/ray" --disable-usage-stats --block
}

# Remove Ray's files from a node, but nothing that this job would not have used.
remove_files() {
  if is_private; then rm -rf "$node_tmp"; fi
}

count_nodes() {
  "${on_head[@]}" ray list nodes --address="$api" --filter state=ALIVE --format=json --limit=10000 2>/dev/null |
    grep -c '"node_id"' || true
}

read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Arrays instead of functions: `kill` on a function in the background would end only its subshell.
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node")
on_all=(srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --no-kill)
num_workers=$((SLURM_JOB_NUM_NODES - 1))
port=${SCELLST_PORT:-$((20000 + SLURM_JOB_ID % 6000 * 2))}
# Address of the job server on the head's loopback; it requires the token.
api=http://127.0.0.1:$((port + 1))
submission=slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export node_tmp=${SCELLST_TMPDIR:-/tmp}/ray_$SLURM_JOB_ID
# sbatch does not pass this value on to steps.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
steps=()

# Anyone with the token can run code as this user, so only this user may read it.
private=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.scellst-ray-$SLURM_JOB_ID.XXXXXX")
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token
unset RAY_ADDRESS RAY_AUTH_TOKEN

# End only the steps that this script started: the job's step first, the head last.
clean_up() {
  local status=$? index
  trap '' TERM INT
  for ((index = ${#steps[@]} - 1; index >= 0; index--)); do
    kill -TERM "${steps[index]}" 2>/dev/null || true
    wait "${steps[index]}" 2>/dev/null || true
  done
  "${on_all[@]}" bash -c "$(declare -f is_private remove_files); remove_files" remove_files || true
  rm -rf "$private"
  exit "$status"
}
trap clean_up EXIT

# Slurm sends the signal two minutes before the time limit or the loss of nodes; the job writes its
# receipts in that time.
stop_job() {
  echo "stopping the job: Slurm ends its allocation" >&2
  timeout 60 "${on_head[@]}" ray job stop --address="$api" "$submission" >&2 || true
  exit 143
}
trap stop_job TERM INT

head_ip=${SCELLST_HEAD_IP:-$("${on_head[@]}" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1 || true)}
: "${head_ip:?$head_node has only a loopback address: set SCELLST_HEAD_IP}"

node_script="$(declare -f is_private ray_node); ray_node \"\$@\""
echo "head on $head_node ($head_ip:$port), $num_workers worker(s)"
"${on_head[@]}" bash -c "$node_script" ray_node --head \
  --node-ip-address="$head_ip" --port="$port" \
  --dashboard-host=127.0.0.1 --dashboard-port="$((port + 1))" &
steps+=("$!")
# Wait until the job server listens. A query by `ray` would cost a few seconds of CPU each time.
until "${on_head[@]}" bash -c "exec 3<>/dev/tcp/127.0.0.1/$((port + 1))" 2>/dev/null; do
  kill -0 "${steps[0]}" 2>/dev/null || { echo "the head ended: see its messages above" >&2; exit 1; }
  sleep 1
done

if ((num_workers > 0)); then
  # The flags keep the step running on the remaining nodes when a node is lost.
  srun --overlap --nodes="$num_workers" --ntasks="$num_workers" --exclude="$head_node" \
    --no-kill --kill-on-bad-exit=0 --wait=0 \
    bash -c "$node_script" ray_node --address="$head_ip:$port" &
  steps+=("$!")
fi
# Jobs size their actor pools by the nodes at their start.
until num_nodes=$(count_nodes) && ((num_nodes >= SLURM_JOB_NUM_NODES)); do
  kill -0 "${steps[0]}" 2>/dev/null || { echo "the head ended: see its messages above" >&2; exit 1; }
  ((SECONDS < ${SCELLST_WAIT_S:-300})) || { echo "only $num_nodes of $SLURM_JOB_NUM_NODES node(s) are up; starting the job" >&2; break; }
  sleep 3
done

# The job runs in the background, so that bash handles a signal at once.
"${on_head[@]}" ray job submit --address="$api" --submission-id="$submission" -- "$@" &
steps+=("$!")
wait "${steps[-1]}"
