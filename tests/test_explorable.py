"""The mathematics of the interactive figure, as the browser computes it, against NumPy and SciPy."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

SCRIPT = Path(__file__).parent.parent / "book/_static/valleys.js"


def random_problem(seed: int) -> dict:
    """Two quadratics with random, badly conditioned curvature and a diagonal seen from two other directions."""
    draw = np.random.default_rng(seed)

    def positive(condition):
        turn = np.linalg.qr(draw.normal(size=(2, 2)))[0]
        return (turn * [1.0, condition]) @ turn.T

    return {
        "a": {"hessian": positive(0.02).tolist(), "optimum": draw.normal(size=2).tolist()},
        "b": {"hessian": positive(0.1).tolist(), "optimum": draw.normal(size=2).tolist()},
        "fisher": (3 * positive(0.05)).tolist(),
    }


@pytest.fixture(scope="module")
def node():
    program = shutil.which("node")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("the interactive figures are tested with node, which is not on the path")
        pytest.skip("node is not installed, and the interactive figures are written in JavaScript")

    def call(function: str, *arguments):
        code = f"const v = require({json.dumps(str(SCRIPT))}); "
        code += f"console.log(JSON.stringify(v.{function}(...{json.dumps(arguments)})))"
        return json.loads(subprocess.run([program, "-e", code], capture_output=True, text=True, check=True).stdout)

    return call


def pieces(data: dict, method: str, strength: float):
    """Task B's curvature and optimum, the penalty's matrix and its anchor."""
    fisher = np.array(data["fisher"])
    matrix = {"none": np.zeros((2, 2)), "l2": np.trace(fisher) / 2 * np.eye(2), "ewc": fisher}[method]
    return np.array(data["b"]["hessian"]), np.array(data["b"]["optimum"]), strength * matrix, np.array(data["a"]["optimum"])


@pytest.mark.parametrize("method", ["none", "l2", "ewc"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 40.0])
def test_the_end_point_minimises_the_penalised_loss(node, method, strength):
    data = random_problem(1)
    hessian, optimum, penalty, anchor = pieces(data, method, strength)
    point = np.array(node("end", data, method, strength))
    gradient = hessian @ (point - optimum) + penalty @ (point - anchor)
    assert np.abs(gradient).max() < 1e-12


@pytest.mark.parametrize("method", ["none", "l2", "ewc"])
@pytest.mark.parametrize("time", [0.0, 0.5, 7.0])
def test_the_flow_is_the_matrix_exponential(node, method, time):
    data, start = random_problem(2), [0.7, -1.2]
    hessian, optimum, penalty, anchor = pieces(data, method, 2.0)
    goal = np.linalg.solve(hessian + penalty, hessian @ optimum + penalty @ anchor)
    expected = goal + expm(-time * (hessian + penalty)) @ (start - goal)
    np.testing.assert_allclose(node("flow", data, method, 2.0, start, time), expected, rtol=1e-12, atol=1e-12)


def test_the_flow_follows_the_gradient(node):
    data, start = random_problem(3), [1.5, 0.5]
    hessian, optimum, penalty, anchor = pieces(data, "ewc", 5.0)
    run = solve_ivp(
        lambda t, x: -(hessian @ (x - optimum) + penalty @ (x - anchor)), (0, 3), start, rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(node("flow", data, "ewc", 5.0, start, 3.0), run.y[:, -1], atol=1e-8)


def test_the_path_runs_from_the_start_to_the_end(node):
    data, start = random_problem(4), [0.1, 0.2]
    path = np.array(node("path", data, "ewc", 3.0, start))
    assert path[0].tolist() == start
    np.testing.assert_allclose(path[-1], node("end", data, "ewc", 3.0), atol=2e-3)


def test_contours_lie_at_their_level(node):
    task = random_problem(5)["a"]
    hessian, optimum = np.array(task["hessian"]), np.array(task["optimum"])
    d = np.array(node("ellipse", task, 0.37)) - optimum
    np.testing.assert_allclose(((d @ hessian) * d).sum(1) / 2, 0.37, rtol=1e-10)


def test_ewc_with_the_true_curvature_reaches_the_joint_optimum(node):
    """With F = H of task A and lambda = 1 the penalty is task A's loss itself."""
    data = random_problem(6)
    data["fisher"] = data["a"]["hessian"]
    a, b = (np.array(data[t]["hessian"]) for t in "ab")
    both = np.linalg.solve(a + b, a @ data["a"]["optimum"] + b @ data["b"]["optimum"])
    np.testing.assert_allclose(node("end", data, "ewc", 1.0), both, rtol=1e-12)


def test_the_words_give_the_numbers(node):
    data = random_problem(7)
    text = node("describe", data, 2.0)
    for method in ("none", "l2", "ewc"):
        hessian, optimum, penalty, anchor = pieces(data, method, 2.0)
        point = np.linalg.solve(hessian + penalty, hessian @ optimum + penalty @ anchor)
        d = point - np.array(data["a"]["optimum"])
        cost = d @ np.array(data["a"]["hessian"]) @ d / 2
        written = node("excess", data["a"], point.tolist())
        assert written == pytest.approx(cost, rel=1e-12)
    assert "without a penalty" in text and "with L2" in text and "with EWC" in text
