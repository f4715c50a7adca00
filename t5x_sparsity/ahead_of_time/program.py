"""What one compiled program takes on each device: memory, FLOPs, and what it moves.

All is read from what XLA reports, the program's text included, so it also works for programs that
are compiled ahead of time for devices that are not here. Knows nothing of sparsity.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that hand on what they are given.
_COPIES = ("copy", "bitcast", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All the collectives of one kind in one run of a program, on one device."""

    count: int  #: those in a loop once per iteration
    bytes: int  #: of the larger of input and output, summed over them


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What one run of a compiled program takes, on each device."""

    argument_bytes: int
    output_bytes: int  #: donated ones included
    alias_bytes: int  #: of the outputs that replace donated inputs
    temp_bytes: int  #: of what lives only while it runs
    code_bytes: int
    peak_bytes: int  #: inputs, outputs, temporaries and code, what is donated counted once
    flops: float  #: as XLA counts them, the body of a loop once
    collectives: Mapping[str, Collective]  #: by kind, for the kinds there are
    open_loops: int  #: with collectives, but an unknown number of iterations; counted once


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

    @functools.cache
    def count(name: str) -> tuple[Counter[tuple[str, str]], int]:
        """What a computation runs, by kind and field of Collective, and its open loops."""
        total: Counter[tuple[str, str]] = Counter()
        open_loops = 0
        body = computations.get(name, {})
        for x in body.values():
            # of an asynchronous one, the end has the type of its output alone
            kind = x.op.removesuffix("-done")
            if kind in COLLECTIVES:
                total.update({(kind, "count"): 1, (kind, "bytes"): _moved(x, body)})
                continue
            iterations = _iterations(x, body, computations) if x.op == "while" else 1
            inside: Counter[tuple[str, str]] = Counter()
            for called, times in _calls(x, iterations):
                found, open_inside = count(called)
                inside.update({key: times * n for key, n in found.items()})
                open_loops += open_inside
            open_loops += iterations is None and bool(inside)
            total.update(inside)
        return total, open_loops

    total, open_loops = count(entry)
    kinds = [kind for kind in COLLECTIVES if (kind, "count") in total]
    return {k: Collective(total[k, "count"], total[k, "bytes"]) for k in kinds}, open_loops


class _Instruction(NamedTuple):
    type: str
    op: str
    operands: tuple[str, ...]
    literal: str  # what is between the operation's parentheses
    attributes: str


# {name: instruction}, in order: the last is the result
_Computation = Mapping[str, _Instruction]

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\(")


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module, and the entry's name."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := _HEAD.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            close = _closing(line, match.end() - 1)
            literal = line[match.end() : close]
            current[match[1]] = _Instruction(
                type=match[2],
                op=match[3],
                operands=tuple(re.findall(r"%([^\s,()]+)", literal)),
                literal=literal,
                attributes=line[close + 1 :],
            )
    return computations, entry


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


def _calls(x: _Instruction, iterations: int | None) -> list[tuple[str, int]]:
    """The computations that an instruction calls, and how often: once, but for loops."""
    if x.op == "while":
        body, condition = _attribute(x, "body"), _attribute(x, "condition")
        known = iterations is not None
        return [(body, iterations if known else 1), (condition, iterations + 1 if known else 1)]
    if x.op in ("async-update", "async-done"):  # they name what async-start calls
        return []
    names = [
        _attribute(x, n) for n in ("calls", "to_apply", "true_computation", "false_computation")
    ]
    if match := re.search(r"\bbranch_computations=\{([^}]*)\}", x.attributes):
        names += [n.strip().lstrip("%") for n in match[1].split(",")]
    return [(n, 1) for n in names if n]


def _moved(x: _Instruction, body: _Computation) -> int:
    """Bytes of a collective's inputs or outputs, the larger of the two."""
    if x.op.endswith("-done") and x.operands[0] in body:
        operands = body[x.operands[0]].operands  # those of its start
    else:
        operands = x.operands
    return max(sum(_bytes(body[name].type) for name in operands if name in body), _bytes(x.type))


def _bytes(type_: str) -> int:
    total = 0
    for name, dims in re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", type_):
        bits = 8 if name == "pred" else int((re.search(r"\d+", name) or ["0"])[0])
        size = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
        total += math.ceil(bits * size / 8)
    return total


def _iterations(
    x: _Instruction, body: _Computation, computations: Mapping[str, _Computation]
) -> int | None:
    """The iterations of a while loop: as XLA notes them, or from a condition `i < constant`."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes):
        return int(match[1])
    condition = computations.get(_attribute(x, "condition"), {})
    root = next(reversed(condition.values()), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.attributes:
        return None
    index = _state_index(root.operands[0], condition)
    state = body.get(x.operands[0])
    if index is None or state is None or state.op != "tuple":
        return None
    start, end = _constant(state.operands[index], body), _constant(root.operands[1], condition)
    if end is None or start is None:
        return None
    following = computations.get(_attribute(x, "body"), {})
    return max(end - start, 0) if _adds_one(index, following) else None


def _source(name: str, body: _Computation) -> _Instruction | None:
    """The instruction that a value comes from, seen through copies."""
    x = body.get(name)
    while x is not None and x.op in _COPIES:
        x = body.get(x.operands[0])
    return x


def _constant(name: str, body: _Computation) -> int | None:
    """The integer that a value is."""
    x = _source(name, body)
    is_integer = x is not None and x.op == "constant" and re.fullmatch(r"-?\d+", x.literal)
    return int(x.literal) if is_integer else None


def _state_index(name: str, body: _Computation) -> int | None:
    """Which part of a loop's state an instruction takes."""
    x = body.get(name)
    is_part = x is not None and x.op == "get-tuple-element"
    return int(_attribute(x, "index")) if is_part else None


def _adds_one(index: int, body: _Computation) -> bool:
    """Whether a loop's body adds 1 to this part of its state."""
    root = next(reversed(body.values()), None)
    if root is None or root.op != "tuple" or index >= len(root.operands):
        return False
    step = _source(root.operands[index], body)
    if step is None or step.op != "add":
        return False
    a, b = step.operands
    pairs = ((a, b), (b, a))
    return any(_state_index(x, body) == index and _constant(y, body) == 1 for x, y in pairs)
