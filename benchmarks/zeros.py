"""Time of linear layers with zeros in the runtimes for CPUs that might use them.

`python -m benchmarks.zeros` writes benchmarks/results/zeros.md. It needs `pip install openvino onnx onnxruntime`. The
model is a chain of square layers with ReLU between them, whose weights are larger than any cache together, as in
decoding. Every runtime gets the same weights and the same number of threads; the zeros are random, since no runtime
here looks at their places but for 2:4.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import write_table

Weights = list[NDArray[np.float32]]
Run = Callable[[NDArray[np.float32]], Any]
ZEROS = ("none", "2:4", "50%", "80%", "95%")


def weights(zeros: str, layers: int, width: int) -> Weights:
    """Return the weights [width, width] of the layers, with zeros of a pattern."""
    generator, found = np.random.default_rng(0), Weights()
    for _ in range(layers):
        weight = generator.standard_normal((width, width), np.float32) / np.float32(width) ** 0.5
        if zeros == "2:4":
            groups = weight.reshape(-1, 4)
            np.put_along_axis(groups, np.abs(groups).argsort(1)[:, :2], 0.0, 1)
        elif zeros != "none":
            weight[generator.random(weight.shape, np.float32) < float(zeros.rstrip("%")) / 100] = 0.0
        found.append(weight)
    return found


def in_torch(every: Weights, threads: int, *, sparse: bool) -> Run:
    """Return a run of torch, with dense weights or in CSR."""
    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(weight) for weight in every]
    layers = [tensor.to_sparse_csr() if sparse else tensor for tensor in tensors]

    def run(inputs: NDArray[np.float32]) -> torch.Tensor:
        states = torch.from_numpy(inputs).t()
        for layer in layers:
            states = (layer @ states).relu()
        return states

    return run


def in_onnxruntime(every: Weights, threads: int) -> Run:
    """Return a run of onnxruntime in float32."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    onnxruntime.disable_telemetry_events()
    width, nodes, tensors, name = len(every[0]), [], [], "x"
    for number, weight in enumerate(every):
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Relu", [f"m{number}"], [name := f"r{number}"]))
    ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n", width]) for each in ("x", name)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model), options, ["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {"x": inputs})


def in_openvino(every: Weights, threads: int, *, precision: str, rate: float | None = None) -> Run:
    """Return a run of OpenVINO in f32, bf16 or i8; `rate` switches sparse weights on from that share of zeros."""
    import openvino  # pyright: ignore[reportMissingImports]
    from openvino import opset13 as ops  # pyright: ignore[reportMissingImports]

    width = len(every[0])
    parameter = ops.parameter([-1, width], np.float32)
    states = parameter
    for weight in every:
        if precision == "i8":
            scale = np.abs(weight).max(1, keepdims=True) / 127
            states = ops.fake_quantize(states, np.float32(0), np.float32(8), np.float32(0), np.float32(8), 256)
            integers = ops.constant(np.rint(weight / scale).astype(np.int8))
            matrix = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale.astype(np.float32)))
        else:
            matrix = ops.constant(weight)
        states = ops.relu(ops.matmul(states, matrix, False, True))
    hint = {"i8": "f32"}.get(precision, precision)
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    if rate is not None:
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = rate
    compiled = openvino.Core().compile_model(openvino.Model([states], [parameter], "chain"), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer([inputs])


def runtimes(threads: int) -> Iterator[tuple[str, Callable[[Weights], Run]]]:
    """Yield the name of each runtime and a function that prepares its run."""
    yield f"torch {version('torch')}, float32", lambda every: in_torch(every, threads, sparse=False)
    yield f"torch {version('torch')}, CSR", lambda every: in_torch(every, threads, sparse=True)
    yield f"onnxruntime {version('onnxruntime')}, float32", lambda every: in_onnxruntime(every, threads)
    name = f"OpenVINO {version('openvino')}"
    yield f"{name}, float32", lambda every: in_openvino(every, threads, precision="f32")
    yield f"{name}, bfloat16", lambda every: in_openvino(every, threads, precision="bf16")
    yield f"{name}, int8", lambda every: in_openvino(every, threads, precision="i8")
    yield f"{name}, int8, sparse weights", lambda every: in_openvino(every, threads, precision="i8", rate=0.4)


def milliseconds(run: Run, inputs: NDArray[np.float32], repeats: int) -> float:
    """Return the median time of a run."""
    run(inputs)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(inputs)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Time every runtime with every pattern of zeros, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    generator, rows = np.random.default_rng(1), list[dict[str, Any]]()
    for zeros in ZEROS:
        every = weights(zeros, options.layers, options.width)
        for name, prepare in runtimes(options.threads):
            run = prepare(every)
            for tokens in (1, 64):
                inputs = generator.standard_normal((tokens, options.width), np.float32)
                found = next((row for row in rows if row["runtime"] == name and row["tokens"] == tokens), None)
                if found is None:
                    rows.append(found := {"runtime": name, "tokens": tokens})
                found[f"zeros: {zeros}"] = round(milliseconds(run, inputs, options.repeats), 2)
            del run
            print(zeros, name, flush=True)
    title = (
        f"Milliseconds of {options.layers} linear layers of {options.width} by {options.width}, "
        f"{options.threads} thread, medians of {options.repeats}"
    )
    print(write_table("zeros", title, sorted(rows, key=lambda row: row["tokens"])))


if __name__ == "__main__":
    main()
