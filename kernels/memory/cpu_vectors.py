"""Eight numbers side by side as a Numba type, so that a kernel says where its vector registers are.

Left to itself, LLVM vectorises a loop only after proving, or checking at run time, that the arrays in it do not
overlap; with rows of a few dozen numbers those checks cost as much as the work. Values of type ``Lanes`` are LLVM
vectors from the start: nothing is proved, no reordering of sums is licensed, and a machine with narrower registers
takes several of them. ``+ - * /`` mix them with scalars, which are repeated over the lanes.

Only ``cpu_kernel.py`` imports this, and only once something is to be compiled.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

WIDTH = 8


class Lanes(types.Type):
    """The type of ``WIDTH`` floating-point numbers."""

    def __init__(self, scalar):
        self.scalar = scalar
        super().__init__(name=f"Lanes({scalar})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        scalar = manager.lookup(lanes.scalar).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(scalar, WIDTH))


def _lanes_among(*operands):
    """Return the Lanes type among the operands if all are numbers it can be combined with, else None."""
    lanes = next((operand for operand in operands if isinstance(operand, Lanes)), None)
    numbers = (Lanes, types.Float, types.Integer)
    return lanes if all(isinstance(operand, numbers) for operand in operands) else None


def _repeat(context, builder, value, source, lanes):
    """Lower a scalar of type ``source`` to every lane; a value that is lanes already passes through."""
    if isinstance(source, Lanes):
        return value
    scalar = context.cast(builder, value, source, lanes.scalar)
    vector = ir.VectorType(scalar.type, WIDTH)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, first, first, [0] * WIDTH)


def _shuffle(builder, a, b, indices):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices)))


def _add_arithmetic(function, instruction):
    @type_callable(function)
    def type_operands(context):
        return lambda a, b: _lanes_among(a, b)

    def lower(context, builder, signature, values):
        lanes = signature.return_type
        operands = [_repeat(context, builder, *pair, lanes) for pair in zip(values, signature.args, strict=True)]
        return getattr(builder, instruction)(*operands)

    for operands in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(function, *operands)(lower)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _add_arithmetic(_function, _instruction)


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Return ``a b + c``, in one instruction and one rounding where the machine has that instruction."""
    lanes = _lanes_among(a, b, c)

    def lower(context, builder, signature, values):
        operands = [_repeat(context, builder, *pair, lanes) for pair in zip(values, signature.args, strict=True)]
        vector = operands[0].type
        name = f"llvm.fmuladd.v{WIDTH}f{lanes.scalar.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        return builder.call(function, operands)

    return lanes(a, b, c), lower


@intrinsic
def square_root(typing_context, lanes):
    """Return the square root of every lane."""

    def lower(context, builder, signature, values):
        vector = values[0].type
        name = f"llvm.sqrt.v{WIDTH}f{lanes.scalar.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
        return builder.call(function, values)

    return lanes(lanes), lower


@intrinsic
def pointer(typing_context, array):
    """Return where an array of one axis starts: one number to hand on instead of an array's seven."""

    def lower(context, builder, signature, values):
        return context.make_array(signature.args[0])(context, builder, values[0]).data

    return types.CPointer(array.dtype)(array), lower


@intrinsic
def pointer_to(typing_context, array, address):
    """Return an address as a pointer to numbers of the type of those in ``array``."""
    result = types.CPointer(array.dtype)

    def lower(context, builder, signature, values):
        return builder.inttoptr(values[1], context.get_value_type(result))

    return result(array, types.int64), lower


@intrinsic
def as_integers(typing_context, array):
    """Return a pointer as one to 64-bit integers at the same place."""
    result = types.CPointer(types.int64)

    def lower(context, builder, signature, values):
        return builder.bitcast(values[0], context.get_value_type(result))

    return result(array), lower


@intrinsic
def after(typing_context, array, index):
    """Return a pointer to ``array[index]``."""

    def lower(context, builder, signature, values):
        return builder.gep(values[0], [values[1]])

    return array(array, types.int64), lower


@intrinsic
def take(typing_context, integers, index, count):
    """Add to ``integers[index]``, which several threads may do at once, and return what it was before."""

    def lower(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.gep(values[0], [values[1]]), values[2], "monotonic")

    return types.int64(integers, types.int64, types.int64), lower


@intrinsic
def load_double(typing_context, integers, index):
    """Return the number whose bits ``integers[index]`` holds."""

    def lower(context, builder, signature, values):
        bits = builder.load(builder.gep(values[0], [values[1]]))
        return builder.bitcast(bits, ir.DoubleType())

    return types.float64(integers, types.int64), lower


def _alignment(scalar):
    return scalar.bitwidth // 8


@intrinsic
def load(typing_context, array, index):
    """Return eight neighbours starting at ``array[index]``; the index is not checked."""
    lanes = Lanes(array.dtype)

    def lower(context, builder, signature, values):
        place = builder.gep(values[0], [values[1]])
        vector = context.get_value_type(lanes)
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=_alignment(lanes.scalar))

    return lanes(array, types.int64), lower


@intrinsic
def load_each(typing_context, array, a, b, c, d, e, f, g, h):
    """Return eight numbers from anywhere in an array; the indices are not checked."""
    lanes = Lanes(array.dtype)

    def lower(context, builder, signature, values):
        vector = ir.Constant(context.get_value_type(lanes), ir.Undefined)
        for lane, index in enumerate(values[1:]):
            number = builder.load(builder.gep(values[0], [index]))
            vector = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), lane))
        return vector

    return lanes(array, *[types.int64] * WIDTH), lower


@intrinsic
def store(typing_context, array, index, lanes):
    """Write eight neighbours starting at ``array[index]``; the index is not checked."""

    def lower(context, builder, signature, values):
        place = builder.gep(values[0], [values[1]])
        vector = context.get_value_type(lanes)
        builder.store(values[2], builder.bitcast(place, vector.as_pointer()), align=_alignment(lanes.scalar))
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), lower


@intrinsic
def store_halves(typing_context, array, first, second, lanes):
    """Write the first four lanes from ``array[first]`` on, and the others from ``array[second]`` on."""

    def lower(context, builder, signature, values):
        half = ir.VectorType(context.get_value_type(lanes.scalar), WIDTH // 2).as_pointer()
        for index, start in zip(values[1:3], (0, WIDTH // 2), strict=True):
            part = _shuffle(builder, values[3], values[3], range(start, start + WIDTH // 2))
            place = builder.bitcast(builder.gep(values[0], [index]), half)
            builder.store(part, place, align=_alignment(lanes.scalar))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, lanes), lower


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of ``array[index]``, which may lie outside the array."""

    def lower(context, builder, signature, values):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        place = builder.bitcast(builder.gep(values[0], [values[1]]), byte)
        builder.call(function, [place, word(0), word(3), word(1)])  # to read, to be kept, data
        return context.get_dummy_value()

    return types.void(array, types.int64), lower


@intrinsic
def load_one(typing_context, array, index):
    """Return ``array[index]`` without Python's rule that a negative index counts from the end."""

    def lower(context, builder, signature, values):
        return builder.load(builder.gep(values[0], [values[1]]))

    return array.dtype(array, types.int64), lower


@intrinsic
def store_one(typing_context, array, index, value):
    """Set ``array[index]`` without Python's rule that a negative index counts from the end."""

    def lower(context, builder, signature, values):
        value = context.cast(builder, values[2], signature.args[2], signature.args[0].dtype)
        builder.store(value, builder.gep(values[0], [values[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), lower


@intrinsic
def zero(typing_context, array):
    """Return eight zeros of an array's type."""
    lanes = Lanes(array.dtype)

    def lower(context, builder, signature, values):
        return ir.Constant(context.get_value_type(lanes), [0.0] * WIDTH)

    return lanes(array), lower


@intrinsic
def repeat(typing_context, scalar):
    """Return eight times the same number."""
    lanes = Lanes(scalar)

    def lower(context, builder, signature, values):
        return _repeat(context, builder, values[0], scalar, lanes)

    return lanes(scalar), lower


def _select_by_comparison(builder, comparison, a, b):
    """Take a where it compares so with b, else b: a nan in b stays, and so does one in ``a`` if it is passed as b."""
    return builder.select(builder.fcmp_ordered(comparison, a, b), a, b)


@intrinsic
def clamp(typing_context, lanes, low, high):
    """Return the lanes, moved to ``low`` and ``high`` where they lie beyond; nan stays nan."""

    def lower(context, builder, signature, values):
        x, low_lanes, high_lanes = (
            _repeat(context, builder, *pair, lanes) for pair in zip(values, signature.args, strict=True)
        )
        x = _select_by_comparison(builder, "<", high_lanes, x)
        return _select_by_comparison(builder, ">", low_lanes, x)

    return lanes(lanes, low, high), lower


@intrinsic
def zero_below(typing_context, bound, x, lanes):
    """Return the lanes, but 0 where x is less than the bound."""

    def lower(context, builder, signature, values):
        is_below = builder.fcmp_ordered("<", values[1], _repeat(context, builder, values[0], bound, x))
        return builder.select(is_below, ir.Constant(values[2].type, [0.0] * WIDTH), values[2])

    return lanes(bound, x, lanes), lower


@intrinsic
def maximum(typing_context, a, b):
    """Return the larger of each pair; where one is nan, the second."""

    def lower(context, builder, signature, values):
        return _select_by_comparison(builder, ">", *values)

    return a(a, b), lower


@intrinsic
def scale_by_power(typing_context, lanes, shifted, magic):
    """Return the lanes times ``2 ** n``, where ``shifted`` is ``n + magic`` and its last mantissa bits hold n.

    In two factors, because 2 ** n may not be a normal number although the product is.
    """
    bits, mantissa, bias = (32, 23, 127) if lanes.scalar.bitwidth == 32 else (64, 52, 1023)

    def lower(context, builder, signature, values):
        integers = ir.VectorType(ir.IntType(bits), WIDTH)

        def constant(number):
            return ir.Constant(integers, [number] * WIDTH)

        def power(exponent):
            return builder.bitcast(
                builder.shl(builder.add(exponent, constant(bias)), constant(mantissa)), values[0].type
            )

        magic_lanes = _repeat(context, builder, values[2], signature.args[2], lanes)
        n = builder.sub(builder.bitcast(values[1], integers), builder.bitcast(magic_lanes, integers))
        half = builder.ashr(n, constant(1))
        return builder.fmul(builder.fmul(values[0], power(half)), power(builder.sub(n, half)))

    return lanes(lanes, lanes, magic), lower


@intrinsic
def add_exponent(typing_context, lanes, shifted):
    """Return the lanes times ``2 ** n``, n being the last mantissa bits of ``shifted``; both are normal numbers."""
    bits, mantissa = (32, 23) if lanes.scalar.bitwidth == 32 else (64, 52)

    def lower(context, builder, signature, values):
        integers = ir.VectorType(ir.IntType(bits), WIDTH)
        n = builder.shl(builder.bitcast(values[1], integers), ir.Constant(integers, [mantissa] * WIDTH))
        return builder.bitcast(builder.add(builder.bitcast(values[0], integers), n), values[0].type)

    return lanes(lanes, lanes), lower


def _fold(builder, values, first, second):
    """Halve a list of vectors: sum what two shuffles pick from each pair."""
    return [
        builder.fadd(_shuffle(builder, a, b, first), _shuffle(builder, a, b, second))
        for a, b in zip(values[::2], values[1::2], strict=True)
    ]


@intrinsic
def sum_each(typing_context, a, b, c, d, e, f, g, h):
    """Return the sums over the lanes of eight vectors, one per lane: cheaper together than one by one."""

    def lower(context, builder, signature, values):
        fours = _fold(builder, values, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15))
        twos = _fold(builder, fours, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
        return _fold(builder, twos, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))[0]

    return a(a, b, c, d, e, f, g, h), lower


@intrinsic
def transpose(typing_context, a, b, c, d, e, f, g, h):
    """Return the columns of eight rows, as a tuple."""

    def lower(context, builder, signature, values):
        rows = list(values)
        for stride in (1, 2, 4):  # exchange the lanes whose numbers differ in one bit between rows that differ in it
            low = [lane if not lane & stride else lane - stride + WIDTH for lane in range(WIDTH)]
            high = [lane + stride if not lane & stride else lane + WIDTH for lane in range(WIDTH)]
            exchanged = list(rows)
            for row in range(WIDTH):
                if not row & stride:
                    pair = rows[row], rows[row + stride]
                    exchanged[row] = _shuffle(builder, *pair, low)
                    exchanged[row + stride] = _shuffle(builder, *pair, high)
            rows = exchanged
        return context.make_tuple(builder, signature.return_type, rows)

    return types.UniTuple(a, WIDTH)(a, b, c, d, e, f, g, h), lower


def _reduce(combine):
    """Make a lowering that folds the lanes in halves, and the halves again, always in the same order."""

    def lower(context, builder, signature, values):
        vector = values[0]
        for half in (4, 2, 1):
            moved = _shuffle(builder, vector, vector, [(lane + half) % WIDTH for lane in range(WIDTH)])
            vector = combine(builder, vector, moved)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return lower


@intrinsic
def sum_lanes(typing_context, lanes):
    """Return the sum of the eight numbers."""
    return lanes.scalar(lanes), _reduce(lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def largest_lane(typing_context, lanes):
    """Return the largest of the eight numbers."""
    return lanes.scalar(lanes), _reduce(lambda builder, a, b: _select_by_comparison(builder, ">", a, b))
