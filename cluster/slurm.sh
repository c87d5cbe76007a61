#!/usr/bin/env bash
# Ray over the nodes of a Slurm allocation, for one job, and gone with it:
#   source .venv/bin/activate                       # where `ray` and scellst_ray are
#   sbatch --nodes=4 cluster/slurm.sh python jobs/predict.py --config jobs/predict.yaml
# The environment and the folder must be on a filesystem that all nodes share. Flags of sbatch go over
# the lines below; with --gpus-per-node=N each node offers N GPUs. Submitted again, the same command
# does only what its run folder lacks.
#   SCELLST_HEAD_IP  address of the head by which the workers reach it; by default as its name resolves
#   SCELLST_PORT     first of two free ports on the head; by default made from the job's number
#   SCELLST_TMPDIR   folder for Ray's files on a disk of each node's own, 40 characters at most: /tmp
#   SCELLST_WAIT_S   how long to wait for all nodes before the job starts with those there are: 300
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

# A node of the cluster, in the foreground of its Slurm step. It is sent there as text: a batch script
# lies on the first node alone.
ray_node() {
  # Ray sees the machine, not the share of it that is the job's.
  local limits=(--num-cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
  limits+=(--num-gpus="${SLURM_GPUS_ON_NODE:-0}")
  if [[ -n ${SLURM_MEM_PER_NODE:-} ]]; then
    local mebibyte=$((1024 * 1024))
    limits+=(--memory=$((SLURM_MEM_PER_NODE * mebibyte * 6 / 10)))
    limits+=(--object-store-memory=$((SLURM_MEM_PER_NODE * mebibyte * 2 / 10)))
  fi
  (umask 077 && mkdir -p "$node_tmp")
  exec ray start "$@" "${limits[@]}" --temp-dir="$node_tmp" --disable-usage-stats --block
}

count_nodes() {
  "${on_head[@]}" ray list nodes --address="$api" --filter state=ALIVE --format=json --limit=10000 2>/dev/null |
    grep -c '"node_id"' || true
}

read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# No functions: of one in the background, `kill` would reach the subshell, and srun would go on.
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node")
on_all=(srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --no-kill)
num_workers=$((SLURM_JOB_NUM_NODES - 1))
port=${SCELLST_PORT:-$((20000 + SLURM_JOB_ID % 6000 * 2))}
# The job server, on the head's loopback; it answers those who have the token.
api=http://127.0.0.1:$((port + 1))
submission=slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export node_tmp=${SCELLST_TMPDIR:-/tmp}/ray_$SLURM_JOB_ID
# Steps do not get it from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
steps=()

# Whoever has the token can run code as this user: none but this user can read it.
private=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.scellst-ray-$SLURM_JOB_ID.XXXXXX")
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token
unset RAY_ADDRESS RAY_AUTH_TOKEN

# What this script started, and nothing else: the job's step first, the head last.
clean_up() {
  local status=$? index
  trap '' TERM INT
  for ((index = ${#steps[@]} - 1; index >= 0; index--)); do
    kill -TERM "${steps[index]}" 2>/dev/null || true
    wait "${steps[index]}" 2>/dev/null || true
  done
  "${on_all[@]}" rm -rf "$node_tmp" || true
  rm -rf "$private"
  exit "$status"
}
trap clean_up EXIT

# Slurm says so two minutes before the time is up or the nodes go: time to write what is ready.
stop_job() {
  echo "told to stop" >&2
  timeout 60 "${on_head[@]}" ray job stop --address="$api" "$submission" >&2 || true
  exit 143
}
trap stop_job TERM INT

head_ip=${SCELLST_HEAD_IP:-$("${on_head[@]}" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1 || true)}
: "${head_ip:?$head_node has no address but loopback: set SCELLST_HEAD_IP}"

node_script="$(declare -f ray_node); ray_node \"\$@\""
echo "head on $head_node ($head_ip:$port), $num_workers worker(s)"
"${on_head[@]}" bash -c "$node_script" ray_node --head \
  --node-ip-address="$head_ip" --port="$port" \
  --dashboard-host=127.0.0.1 --dashboard-port="$((port + 1))" &
steps+=("$!")
# Until somebody listens there. Asking Ray would cost a few seconds of CPU each time.
until "${on_head[@]}" bash -c "exec 3<>/dev/tcp/127.0.0.1/$((port + 1))" 2>/dev/null; do
  kill -0 "${steps[0]}" 2>/dev/null || { echo "the head ended" >&2; exit 1; }
  sleep 1
done

if ((num_workers > 0)); then
  # A node that is lost takes its own share along, and no more.
  srun --overlap --nodes="$num_workers" --ntasks="$num_workers" --exclude="$head_node" \
    --no-kill --kill-on-bad-exit=0 --wait=0 \
    bash -c "$node_script" ray_node --address="$head_ip:$port" &
  steps+=("$!")
fi
# Jobs size their pools by what they find at their start.
until num_nodes=$(count_nodes) && ((num_nodes >= SLURM_JOB_NUM_NODES)); do
  kill -0 "${steps[0]}" 2>/dev/null || { echo "the head ended" >&2; exit 1; }
  ((SECONDS < ${SCELLST_WAIT_S:-300})) || { echo "$num_nodes node(s) came; going on" >&2; break; }
  sleep 3
done

# In the background, so that a signal is heard at once.
"${on_head[@]}" ray job submit --address="$api" --submission-id="$submission" -- "$@" &
steps+=("$!")
wait "${steps[-1]}"
