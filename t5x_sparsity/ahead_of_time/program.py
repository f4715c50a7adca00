"""What one compiled program takes on each device: memory, FLOPs, and what it moves.

All is read from what XLA reports, the program's text included, so it also works for programs that
are compiled ahead of time for devices that are not here. Knows nothing of sparsity.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """All the collectives of one kind in one run of a program.

    Attributes:
      count: how many one device takes part in, those in a loop once per iteration.
      bytes: of the larger of input and output on one device, summed over them.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What one run of a compiled program takes, on each device.

    Attributes:
      argument_bytes: of all inputs.
      output_bytes: of all outputs, donated ones included.
      alias_bytes: of the outputs that replace donated inputs.
      temp_bytes: of what lives only while it runs.
      code_bytes: of the program itself.
      peak_bytes: inputs, outputs, temporaries and code together, what is donated counted once.
      flops: as XLA counts them, the body of a loop once.
      collectives: kind -> `Collective`, for the kinds there are.
      open_loops: loops with collectives whose number of iterations is unknown; counted once.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int
    flops: float
    collectives: Mapping[str, Collective]
    open_loops: int = 0


def describe(compiled: Any) -> CompiledStep:
    """Describes what `jax.jit(f).lower(...).compile()` returned."""
    memory = compiled.memory_analysis()

    def size(name):
        return int(getattr(memory, f"{name}_size_in_bytes", 0))

    arguments, outputs, aliased = size("argument"), size("output"), size("alias")
    temporaries, code = size("temp"), size("generated_code")
    found, open_loops = collectives(compiled.as_text())
    return CompiledStep(
        argument_bytes=arguments,
        output_bytes=outputs,
        alias_bytes=aliased,
        temp_bytes=temporaries,
        code_bytes=code,
        peak_bytes=arguments + outputs - aliased + temporaries + code,
        flops=max(float((compiled.cost_analysis() or {}).get("flops", 0.0)), 0.0),
        collectives=found,
        open_loops=open_loops,
    )


def collectives(text: str) -> tuple[dict[str, Collective], int]:
    """({kind: Collective}, number of loops with collectives and unknown iterations).

    text: of a compiled module. Every branch of a conditional counts.
    """
    computations, entry = _parse(text)
    memo: dict[str, tuple[dict[str, Collective], int]] = {}

    def count(name: str) -> tuple[dict[str, Collective], int]:
        if name in memo:
            return memo[name]
        total: dict[str, Collective] = {}
        unknown = 0
        body = computations.get(name, {})

        def add(found: Mapping[str, Collective], times: int) -> None:
            for kind, (n, size) in found.items():
                before = total.get(kind, Collective(0, 0))
                total[kind] = Collective(before.count + times * n, before.bytes + times * size)

        for x in body.values():
            kind = x.op.removesuffix("-start")
            if kind in COLLECTIVES:
                add({kind: Collective(1, _moved(x, body))}, 1)
            elif x.op == "while":
                inner, unknown_inside = count(_attribute(x, "body"))
                test, unknown_in_test = count(_attribute(x, "condition"))
                iterations = _iterations(x, body, computations)
                unknown += (
                    unknown_inside + unknown_in_test + (iterations is None and bool(inner | test))
                )
                add(inner, 1 if iterations is None else iterations)
                add(test, 1 if iterations is None else iterations + 1)
            elif x.op not in ("async-update", "async-done"):  # they name what async-start calls
                for called in _called(x):
                    found, unknown_inside = count(called)
                    unknown += unknown_inside
                    add(found, 1)
        memo[name] = total, unknown
        return memo[name]

    found, unknown = count(entry)
    return {kind: found[kind] for kind in COLLECTIVES if kind in found}, unknown


class _Instruction(NamedTuple):
    type: str
    op: str
    operands: tuple[str, ...]
    literal: str  # what is between the operation's parentheses
    attributes: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = ")
_OPERATION = re.compile(r"\s*([\w-]+)\(")


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """The computations of a module, each {name: instruction}, and the entry's name."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            end = _type_end(line, match.end())
            operation = _OPERATION.match(line, end)
            if operation is None:
                continue
            close = _closing(line, operation.end() - 1)
            literal = line[operation.end() : close]
            current[match[1]] = _Instruction(
                type=line[match.end() : end],
                op=operation[1],
                operands=tuple(re.findall(r"%([^\s,()]+)", literal)),
                literal=literal,
                attributes=line[close + 1 :],
            )
    return computations, entry


def _type_end(line: str, start: int) -> int:
    """Where a type ends: a tuple's at its parenthesis, another's at the next blank."""
    if line[start : start + 1] == "(":
        return _closing(line, start) + 1
    end = line.find(" ", start)
    return len(line) if end < 0 else end


def _closing(line: str, start: int) -> int:
    """The parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    return len(line)


def _attribute(x: _Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([^\s,}}]+)", x.attributes)
    return match[1] if match else ""


def _called(x: _Instruction) -> list[str]:
    """Names of the computations that an instruction calls, loops aside."""
    names = [
        _attribute(x, n) for n in ("calls", "to_apply", "true_computation", "false_computation")
    ]
    if match := re.search(r"\bbranch_computations=\{([^}]*)\}", x.attributes):
        names += [n.strip().lstrip("%") for n in match[1].split(",")]
    return [n for n in names if n]


def _moved(x: _Instruction, body: Mapping[str, _Instruction]) -> int:
    """Bytes of a collective's inputs or outputs, the larger of the two."""
    if x.op.endswith("-start") and not x.op.startswith("all-reduce"):
        # (inputs, outputs, ...)
        return max((_bytes(part) for part in _parts(x.type)[:2]), default=0)
    inputs = sum(_bytes(body[name].type) for name in x.operands if name in body)
    return max(inputs, _bytes(x.type))


def _parts(type_: str) -> list[str]:
    """The types that a tuple's type lists."""
    parts, depth, last = [], 0, 1
    for i, c in enumerate(type_):
        depth += (c in "({[") - (c in ")}]")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            parts.append(type_[last:i])
            last = i + 1
    return parts


def _bytes(type_: str) -> int:
    total = 0
    for name, dims in re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", type_):
        bits = 8 if name == "pred" else int((re.search(r"\d+", name) or ["0"])[0])
        size = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
        total += math.ceil(bits * size / 8)
    return total


def _iterations(
    x: _Instruction,
    body: Mapping[str, _Instruction],
    computations: Mapping[str, Mapping[str, _Instruction]],
) -> int | None:
    """The iterations of a while loop: as XLA notes them, or from a condition `i < constant`."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes):
        return int(match[1])
    condition = computations.get(_attribute(x, "condition"), {})
    root = next(reversed(condition.values()), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.attributes:
        return None
    counter = condition.get(root.operands[0])
    if counter is None or counter.op != "get-tuple-element":
        return None
    index = int(_attribute(counter, "index"))
    end = _constant(root.operands[1], condition)
    start = None
    loop_state = body.get(x.operands[0])
    if loop_state is not None and loop_state.op == "tuple":
        start = _constant(loop_state.operands[index], body)
    following = computations.get(_attribute(x, "body"), {})
    if end is None or start is None or not _adds_one(index, following):
        return None
    return max(end - start, 0)


def _constant(name: str, body: Mapping[str, _Instruction]) -> int | None:
    """The integer that an instruction is, seen through copies."""
    while (x := body.get(name)) is not None:
        if x.op == "constant":
            return int(x.literal) if re.fullmatch(r"-?\d+", x.literal) else None
        if x.op not in ("copy", "bitcast", "copy-start", "copy-done"):
            return None
        name = x.operands[0]
    return None


def _adds_one(index: int, body: Mapping[str, _Instruction]) -> bool:
    """Whether a loop's body adds 1 to this part of its state."""
    root = next(reversed(body.values()), None)
    if root is None or root.op != "tuple" or index >= len(root.operands):
        return False
    step = body.get(root.operands[index])
    while step is not None and step.op in ("copy", "bitcast"):
        step = body.get(step.operands[0])
    if step is None or step.op != "add":
        return False
    for a, b in (step.operands, reversed(step.operands)):
        counter = body.get(a)
        is_element = counter is not None and counter.op == "get-tuple-element"
        if is_element and _constant(b, body) == 1:
            return int(_attribute(counter, "index")) == index
    return False
