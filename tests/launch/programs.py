"""Stand-ins for the programs that the launch scripts call.

This file, with one link for each name, is put on the PATH. A program writes
its arguments to `calls.jsonl` and does what `plan.json` says: a list of rules
`{"if": TEXT, "times": N, "print": TEXT, "code": N}`, of which the first that
is not used up and whose text (or texts, "A & B") occurs in the command line
counts. The line ends with "@HOST". Training also knows `"hang"`, `"deaf"` and
`"after"`: the number of started processes that it waits for before it ends.
"""

import json
import os
import signal
import sys
import time

# Few imports, because these programs start many times.
HERE = os.environ["STAND_IN"]
NAME = os.path.basename(sys.argv[0])
ARGUMENTS = sys.argv[1:]
HOST = os.environ.get("STAND_IN_HOST", "")
LINE = " ".join([NAME, *ARGUMENTS, f"@{HOST}"])


def record(file: str, entry: object) -> None:
  # One write of one line: other processes append as well.
  with open(f"{HERE}/{file}", "a", encoding="utf-8") as out:
    out.write(json.dumps(entry) + "\n")


def follow_plan() -> dict | None:
  """Returns the rule that counts for this call, with one use less."""
  lock = f"{HERE}/plan.lock"
  while True:
    try:
      os.mkdir(lock)
      break
    except FileExistsError:
      time.sleep(0.01)
  try:
    with open(f"{HERE}/plan.json", encoding="utf-8") as file:
      rules = json.load(file)
    for rule in rules:
      texts = rule["if"].split(" & ")
      if all(t in LINE for t in texts) and rule.get("times", 1) > 0:
        rule["times"] = rule.get("times", 1) - 1
        with open(f"{HERE}/plan.json", "w", encoding="utf-8") as file:
          json.dump(rules, file)
        return rule
  finally:
    os.rmdir(lock)
  return None


def starts() -> int:
  with open(f"{HERE}/events.jsonl", encoding="utf-8") as file:
    return file.read().count('"start"')


def train() -> None:
  """Trains: by plan ends with a code, hangs, or ignores TERM."""
  who = HOST
  for argument in ARGUMENTS:
    if argument.startswith("--process_id="):
      who = argument.removeprefix("--process_id=")
  rule = follow_plan() or {}
  record("secrets.jsonl", [who, os.environ.get("NARVL_CLUSTER_SECRET")])
  record("passed.jsonl", dict(os.environ))

  def on_term(number: int, frame: object) -> None:
    del number, frame
    record("events.jsonl", [who, "TERM"])
    if not rule.get("deaf"):
      time.sleep(0.2)
      record("events.jsonl", [who, "saved"])
      print("saved", flush=True)
      sys.exit(int(os.environ.get("NARVL_STOPPED_CODE", "0")))

  signal.signal(signal.SIGTERM, on_term)
  record("events.jsonl", [who, "start"])
  print(f"training {who} {rule.get('print', '')}", flush=True)
  while rule.get("hang") or starts() < rule.get("after", 0):
    time.sleep(0.02)
  sys.exit(rule.get("code", 0))


def gcloud() -> None:
  """Runs `ssh` and `scp` for each host, which is a folder."""
  rule = follow_plan()
  if rule and not rule.get("repeat"):
    print(rule.get("print", ""), flush=True)
    sys.exit(rule.get("code", 0))
  if "describe" in ARGUMENTS:
    sys.exit("NOT_FOUND")
  hosts = [
    f"{HERE}/hosts/{name}" for name in sorted(os.listdir(f"{HERE}/hosts"))
  ]
  for argument in ARGUMENTS:
    if argument.startswith("--worker=") and argument != "--worker=all":
      hosts = [hosts[int(argument.removeprefix("--worker="))]]
  if "ssh" in ARGUMENTS:
    if rule and rule.get("repeat"):
      ssh(hosts)
    sys.exit(ssh(hosts))
  if "scp" in ARGUMENTS:
    source, target = (a for a in ARGUMENTS[4:] if not a.startswith("--"))
    for host in hosts:
      with open(on_host(source, host), "rb") as file:
        content = file.read()
      with open(on_host(target, host), "wb") as file:
        file.write(content)


def on_host(path: str, host: str) -> str:
  return f"{host}/{path.split(':')[1]}" if ":" in path else path


def ssh(hosts: list[str]) -> int:
  """Runs the command as sshd does: by a shell, in the home folder."""
  prefix = "--command="
  command = next(a for a in ARGUMENTS if a.startswith(prefix))
  line = ["bash", "-c", command.removeprefix(prefix)]
  processes = []
  for host in hosts:
    os.chdir(host)
    name = os.path.basename(host)
    env = dict(os.environ, HOME=host, STAND_IN_HOST=name)
    processes.append(os.spawnvpe(os.P_NOWAIT, "bash", line, env))
  codes = [wait(process) for process in processes]
  return next((code for code in codes if code), 0)


def wait(process: int) -> int:
  code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
  return code if code >= 0 else 128 - code


def python3() -> None:
  """Installs: makes a virtual environment whose Python is a stand-in."""
  rule = follow_plan()
  if rule:
    sys.exit(rule["code"])
  if "venv" in ARGUMENTS:
    os.makedirs(".venv/bin", exist_ok=True)
    if not os.path.lexists(".venv/bin/python"):
      os.symlink(f"{HERE}/bin/python", ".venv/bin/python")


def srun() -> None:
  """Runs the command once for each of `--nodes`; hands signals on."""
  start = next(i for i, a in enumerate(ARGUMENTS) if not a.startswith("--"))
  flags = dict(a.split("=", 1) for a in ARGUMENTS[:start] if "=" in a)
  command = ARGUMENTS[start:]
  tasks = []
  for rank in range(int(flags["--nodes"])):
    path = flags["--output"].replace("%t", str(rank))
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    tasks.append(
      os.posix_spawnp(
        command[0],
        command,
        dict(os.environ, STAND_IN_HOST=str(rank)),
        file_actions=[
          (os.POSIX_SPAWN_OPEN, 1, path, mode, 0o644),
          (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
      )
    )
  interrupts = []
  ended = []

  def send(number: int) -> None:
    for task in tasks:
      if task not in ended:
        os.kill(task, number)

  def hand_on(number: int, frame: object) -> None:
    del frame
    record("events.jsonl", ["srun", signal.Signals(number).name])
    if number == signal.SIGTERM:
      send(number)
    else:
      interrupts.append(number)
    if len(interrupts) == 2:
      send(signal.SIGKILL)

  signal.signal(signal.SIGTERM, hand_on)
  signal.signal(signal.SIGINT, hand_on)
  signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
  highest = 0
  for _ in range(len(tasks)):
    task, status = os.waitpid(-1, 0)
    code = os.waitstatus_to_exitcode(status)
    ended.append(task)
    rank = tasks.index(task)
    if code > 0:
      message = f"srun: error: node{rank}: task {rank}: Exited with exit code"
      print(message, code, file=sys.stderr, flush=True)
    highest = max(highest, code if code >= 0 else 128 - code)
    if len(ended) == 1:
      signal.alarm(int(flags["--wait"]))
  sys.exit(highest)


def kubectl() -> None:
  rule = follow_plan() or {}
  record("events.jsonl", ["kubectl", ARGUMENTS[0]])
  print(rule.get("print", ""), end="", flush=True)
  while rule.get("hang") and not os.path.exists(f"{HERE}/deleted"):
    time.sleep(0.02)
  sys.exit(rule.get("code", 0))


def xpk() -> None:
  rule = follow_plan() or {}
  if "create" in ARGUMENTS:
    record("secrets.jsonl", ["xpk", os.environ.get("NARVL_CLUSTER_SECRET")])
    with open(f"{HERE}/checkout/logs/environment", encoding="utf-8") as file:
      names = [name for name in file.read().split() if "=" not in name]
    record("passed.jsonl", {name: os.environ[name] for name in names})
  if "delete" in ARGUMENTS:
    open(f"{HERE}/deleted", "w").close()
  sys.exit(rule.get("code", 0))


def plain() -> None:
  rule = follow_plan() or {}
  print(rule.get("print", ""))
  sys.exit(rule.get("code", 0))


def main() -> None:
  if NAME == "hostname":
    print(HOST)
    return
  record("calls.jsonl", [NAME, *ARGUMENTS])
  programs = {
    "python": train,
    "python3": python3,
    "gcloud": gcloud,
    "srun": srun,
    "kubectl": kubectl,
    "xpk": xpk,
  }
  programs.get(NAME, plain)()


if __name__ == "__main__":
  main()
