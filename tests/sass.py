"""SASS of a cubin, as `nvdisasm -c -hex` prints it: instructions with the scoreboards that they set and wait for.

An instruction of variable latency, a load for one, sets one of six scoreboards; whoever needs its result names the
scoreboard in a mask that it waits for. Both are in the upper half of the 128-bit instruction.
"""

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r" */\*[0-9a-f]{4,}\*/ +([^;]*?) *;")
_UPPER_HALF = re.compile(r" */\* 0x([0-9a-f]{16}) \*/")
_NO_DESTINATION = re.compile(r"ST|RED|BAR|BRA|SYNCS|MEMBAR|ERRBAR|UBLK|UTMA|EXIT|CCTL|WARPSYNC|B[S]?SY|NOP")


@dataclass
class Instruction:
    text: str  # without its predicate
    predicate: str
    sets: int | None  # the scoreboard that its result is announced on
    waits: int  # a mask

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    def registers(self) -> list[int]:
        return [int(number) for number in re.findall(r"\bR(\d+)\b", self.text)]

    def destinations(self) -> set[int]:
        """The registers that it writes; an approximation for what is looked at here: loads and integer arithmetic."""
        numbers = self.registers()
        if not numbers or _NO_DESTINATION.match(self.opcode) or not re.match(r"\S+ (?:U?P\d, )?R\d", self.text):
            return set()
        width = 4 if ".128" in self.opcode else 2 if re.search(r"\.64|\.WIDE", self.opcode) else 1
        return set(range(numbers[0], numbers[0] + width))

    def sources(self) -> set[int]:
        return set(self.registers()[1:] if self.destinations() else self.registers())


@dataclass
class Label:
    name: str


def functions(text: str) -> dict[str, list[Instruction | Label]]:
    """The kernels of a disassembly, by mangled name, in the order of their code."""
    found, current, pending = {}, None, None
    for line in text.splitlines():
        if line.startswith(".text."):
            current = found.setdefault(line[len(".text.") : line.index(":")], [])
        elif line.startswith(".L_"):
            if current is not None:
                current.append(Label(line[: line.index(":")]))
        elif match := _INSTRUCTION.match(line):
            pending = match[1]
        elif pending is not None and (match := _UPPER_HALF.match(line)):
            upper = int(match[1], 16)
            predicate, _, rest = pending.partition(" ") if pending.startswith("@") else ("", "", pending)
            sets = upper >> 46 & 7
            current.append(Instruction(rest.strip(), predicate, None if sets == 7 else sets, upper >> 52 & 63))
            pending = None
    return found


def outstanding_loads(code: list[Instruction | Label], load: str, at: str) -> list[int]:
    """Where an instruction that matches `at` may come before the result of a `load` that was issued earlier, on any way
    through the code. Each load is followed by its scoreboard, until somebody waits for that."""
    places = {item.name: index for index, item in enumerate(code) if isinstance(item, Label)}
    before: list[int | None] = [None] * (len(code) + 1)  # masks of scoreboards that loads are out on
    early, work = set(), [(0, 0)]
    while work:
        index, mask = work.pop()
        while index < len(code):
            known = before[index]
            if known is not None and known | mask == known:
                break
            before[index] = mask = mask | (known or 0)
            item = code[index]
            if isinstance(item, Instruction):
                mask &= ~item.waits
                if re.match(at, item.text) and mask:
                    early.add(index)
                if re.match(load, item.text) and item.sets is not None and item.predicate != "@!PT":
                    mask |= 1 << item.sets
                target = re.search(r"`\((\.L_\w+)\)", item.text)
                jumps = item.opcode.startswith(("BRA", "CALL", "BREAK", "WARPSYNC"))
                if target and jumps and target[1] in places:
                    work.append((places[target[1]], mask))
                if item.opcode.startswith(("EXIT", "BRA")) and item.predicate == "" and ".U.ANY" not in item.opcode:
                    break
            index += 1
    return sorted(early)


def hangs_on(code: list[Instruction | Label], index: int, load: str) -> bool:
    """Whether an operand of the instruction comes, by a bitwise operation, from a register that a `load` fills: the
    code before the instruction is followed backwards, as it is laid out."""
    loads = [item for item in code if isinstance(item, Instruction) and re.match(load, item.text)]
    filled = set().union(*(item.destinations() for item in loads), set())
    wanted, masked = set(code[index].sources()), set()  # registers it is computed from; those of a bitwise operation
    for item in reversed(code[max(0, index - 100) : index]):
        if isinstance(item, Label) or not item.destinations() & (wanted | masked):
            continue
        if item.destinations() & masked and re.match(load, item.text):
            return True
        if item.destinations() & masked or item.opcode.startswith("LOP3"):
            masked = (masked - item.destinations()) | item.sources()
        else:
            wanted = (wanted - item.destinations()) | item.sources()
    return bool(masked & filled)
