# SPDX-License-Identifier: Apache-2.0
"""A MoE module of one's own, in a model that need not be from transformers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from sida.huggingface.adapter import Compute, ComputePredicted, ExpertArrays, ExpertParameter
from sida.huggingface.layers_adapter import LayersAdapter
from sida.torch.experts_module import ExpertsModule
from sida.torch.stand_in import NOT_LOADED

if TYPE_CHECKING:
    from sida import MoeConfig

NAMES = re.compile(
    r"(?P<expert>0|[1-9]\d*)\.(?P<matrix>gate_proj|up_proj|down_proj)\.(?P<kind>weight|bias)"
    r"|(?P<stack>gate_up_proj|up_proj|down_proj)(?P<suffix>_bias)?"
)
"""What parameters of experts are called here; those of one expert, or of all in one tensor."""
BESIDE = "offloaded_experts"
"""Name of the stand-in in a MoE module that holds its experts' parameters itself."""
EXPECTED = (
    "'0.up_proj.weight', '0.down_proj.weight' and, gated, '0.gate_proj.weight' (each with '.bias', "
    "or none), and so for every expert; or of all experts in one tensor 'up_proj' or, gated, "
    "'gate_up_proj', and 'down_proj' (each with '_bias', or none)"
)


@dataclass(frozen=True)
class ModuleForm:
    """What the experts of a MoE module compute, and what their parameters are called."""

    names: Mapping[str, str]
    """The module's name of a parameter, below its experts, by sida's."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of one expert's weights and biases: "up_proj", "up_proj_bias" and so on."""
    experts: int
    stacked: bool
    """Whether a parameter holds all experts."""
    transposed: bool
    """Whether it holds their matrices transposed."""
    activation: str
    limit: float
    top_k: int

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return "gate_proj" in self.shapes or "gate_up_proj" in self.shapes

    @property
    def biased(self) -> tuple[bool, bool]:
        """Whether up (and gate), and down, have biases."""
        up = "gate_up_proj" if "gate_up_proj" in self.shapes else "up_proj"
        return f"{up}_bias" in self.shapes, "down_proj_bias" in self.shapes

    def config(self, layers: int, dtype: str) -> MoeConfig:
        """Return the shape of all experts of a model, computed in `dtype`."""
        from sida import MoeConfig

        hidden_size, intermediate_size = self.shapes["down_proj"]
        return MoeConfig(
            layers=layers,
            experts=self.experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            top_k=self.top_k,
            activation=self.activation,
            gated=self.gated,
            up_bias=self.biased[0],
            down_bias=self.biased[1],
            dtype=dtype,
            limit=self.limit,
        )


def read_shapes(
    parameters: Mapping[str, Tensor], where: str, *, transposed: bool = False
) -> tuple[int, bool, dict[str, tuple[int, ...]]]:
    """Return how many experts there are, whether they are stacked, and the shapes of one.

    Args:
        parameters: Of the experts, by sida's names.
        where: What they belong to, for messages.
        transposed: Whether the matrices are; the shapes that are returned never are.

    Raises:
        ValueError: A tensor is missing, one too many, or has another shape than it must.
    """
    experts: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, parameter in parameters.items():
        found = NAMES.fullmatch(name)
        assert found is not None
        if found["stack"]:
            experts.setdefault(-1, {})[name] = tuple(parameter.shape)
        else:
            matrix = found["matrix"] + ("_bias" if found["kind"] == "bias" else "")
            experts.setdefault(int(found["expert"]), {})[matrix] = tuple(parameter.shape)
    stacked = -1 in experts
    if sorted(experts) != ([-1] if stacked else list(range(len(experts)))):
        raise ValueError(
            f"{where}: expected parameters of experts 0, 1, 2 and so on, or of all in one tensor, "
            f"got {', '.join('all' if e < 0 else str(e) for e in sorted(experts))}"
        )
    first, count = experts[min(experts)], len(experts)
    if stacked:
        if not all(first.values()) or len({shape[0] for shape in first.values()}) > 1:
            raise ValueError(
                f"{where}: expected tensors of one number of experts, [E, ...], got "
                f"{_describe(first)}"
            )
        count = next(iter(first.values()))[0]
        first = {name: shape[1:] for name, shape in first.items()}
    if transposed:
        first = _transposed(first, stacked, where)
    for expert, shapes in experts.items():
        if not stacked and shapes != first:
            raise ValueError(
                f"{where}: expected experts of one shape, got {_describe(first)} for expert 0 and "
                f"{_describe(shapes)} for expert {expert}"
            )
    _check_shapes(first, where)
    return count, stacked, first


def _transposed(
    found: Mapping[str, tuple[int, ...]], stacked: bool, where: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one expert's tensors untransposed.

    Raises:
        ValueError: sida could not read them so.
    """
    up = found.get("up_proj", ())
    if not stacked or (len(up) == 2 and up[0] == up[1]):
        raise ValueError(
            f"{where}: expected matrices that are transposed to hold all experts, and, without a "
            f"gate, H and I to differ, got {_describe(found)}; hold them as nn.Linear does"
        )
    return {name: shape[::-1] for name, shape in found.items()}


def _check_shapes(found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError unless one expert's tensors are of a form that sida computes."""
    down = found.get("down_proj", ())
    if len(down) == 2:
        hidden, size = down
        matrices = {
            "up_proj": {"up_proj": (size, hidden)},
            "gate_proj": {"gate_proj": (size, hidden), "up_proj": (size, hidden)},
            "gate_up_proj": {"gate_up_proj": (2 * size, hidden)},
        }
        kind = next((k for k in ("gate_up_proj", "gate_proj") if k in found), "up_proj")
        expected: dict[str, tuple[int, ...]] = {**matrices[kind], "down_proj": down}
        if any(f"{name}_bias" in found for name in matrices[kind]):
            expected |= {f"{name}_bias": shape[:1] for name, shape in matrices[kind].items()}
        if "down_proj_bias" in found:
            expected["down_proj_bias"] = (hidden,)
        if found == expected:
            return
    else:
        expected = {"up_proj": ("I", "H"), "down_proj": ("H", "I")}  # type: ignore[dict-item]
    raise ValueError(
        f"{where}: expected experts of {_describe(expected)}, got {_describe(found)}; if they are "
        "transposed, transposed() says so; another kind of expert cannot be offloaded"
    )


def _describe(shapes: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(
        f"{name} [{', '.join(map(str, shape))}]" for name, shape in sorted(shapes.items())
    )


class ModuleExperts(ExpertsModule):
    """Takes the place of the experts of a module of one's own; has no parameters."""

    def __init__(self, form: ModuleForm) -> None:
        super().__init__(form.experts, 0.0)
        self.form = form


class BesideExperts(ModuleExperts):
    """The same in a module that held its experts' parameters itself: one more submodule of it."""

    def weights_prefix(self, prefix: str) -> str:
        """Return what begins the names of its weights: they are the MoE module's own."""
        return prefix.removesuffix(f"{BESIDE}.")


class TakenParameters:
    """A layer's parameters of experts that are taken out of the MoE module for a while."""

    def __init__(self, module: Any, parameters: list[ExpertParameter], names: set[str]) -> None:
        """Take them out, and let nothing be loaded into them.

        Args:
            module: The MoE module.
            parameters: What is taken, of the module and of those below it.
            names: What it is called there.
        """
        owners = {id(found.module): found.module for found in parameters}
        self._before = [(owner, dict(owner._parameters)) for owner in owners.values()]
        for found in parameters:
            del found.module._parameters[found.name]

        def refuse(_: Any, weights: Any, prefix: str, *arguments: Any) -> None:
            if any(prefix + name in weights for name in names):
                arguments[-1].append(NOT_LOADED.format(prefix[:-1]))

        self._hook = module.register_load_state_dict_pre_hook(refuse)

    def give_back(self) -> None:
        """Put them back, in the order in which they were among their modules' other parameters."""
        self._hook.remove()
        for owner, before in self._before:
            now = dict(owner._parameters)
            owner._parameters.clear()
            owner._parameters.update({name: now.get(name, own) for name, own in before.items()})


class ModuleAdapter(LayersAdapter):
    """What sida has to be told of a MoE module, to offload models that have it.

    Derive from it, answer for your module, and call `sida.register_adapter`. The module keeps its
    router and whatever else it does; its experts lie in a submodule of their own, which has their
    parameters and no others, or their parameters are the module's own. Each computes
    ``down(activation(up(x)))`` or, gated, ``down(activation(gate(x)) * up(x))``. While a model is
    offloaded, another module is in that place, to be called as

        ``experts(hidden_states, top_k_index, top_k_weights)``

    with [T, H], ids [T, k] int32 or int64, and weights [T, k] float32 or the hidden states' dtype;
    it returns [T, H] in the dtype of `hidden_states`, the weighted sum over each token's k experts.
    A choice of weight 0 is left out; an id that is no expert's raises IndexError. Where the
    module's own forward does not call its experts so, `forward` says how it runs.

    A call of the whole model is one pass. The module routes: `predictor=`, `routing="predicted"`
    and `sida.train_predictor` raise ValueError. What comes early is what `choose_experts` says.

    Example:
        >>> @sida.register_adapter
        ... class MyAdapter(sida.ModuleAdapter):
        ...     module_class = MyMoe
        ...     def activation(self, module): return "silu"
        ...     def experts_per_token(self, module): return module.top_k

    Attributes:
        module_class: The MoE module's class.
        experts_name: Name of the submodule that holds the experts; "" where the MoE module holds
            their parameters itself, beside its router's. Then `parameter_name` gives None for those
            that are not the experts', and `forward` has to be overridden.
    """

    module_class: ClassVar[type[nn.Module]]
    experts_name: ClassVar[str] = "experts"
    interleaved = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        module_class: Any = getattr(cls, "module_class", None)
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            raise TypeError(
                f"{cls.__name__}: expected module_class to be the class of the MoE module, a torch "
                f"module, got {module_class!r}"
            )
        cls.looks_for = f"{module_class.__name__} ({cls.__name__})"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it is of the class that this adapter is for."""
        return isinstance(module, cls.module_class)

    def __init__(self, model: nn.Module) -> None:
        """Find the MoE modules of a model.

        Raises:
            ValueError: Something about them is not as expected, or not as the adapter says.
            TypeError: The adapter answers with a value of another type.
        """
        super().__init__(model)
        forms: list[ModuleForm] = []
        for name, module in model.named_modules():
            if self.matches(module):
                if not name:
                    raise ValueError(
                        f"expected a model around {type(module).__name__}, got the module by "
                        f"itself: pass the model that it belongs to"
                    )
                self.add_layer(name, module, self.experts_name or BESIDE)
                forms.append(self._form_of(name, module))
                if forms[-1] != forms[0]:
                    raise ValueError(
                        "expected experts of one form in all layers, got "
                        f"{forms[0]} in {self.layer_names[0]} and {forms[-1]} in {name}"
                    )
        self._form = forms[0]
        self.num_experts, self.top_k = self._form.experts, self._form.top_k
        self._taken: dict[int, TakenParameters] = {}

    @abstractmethod
    def activation(self, module: nn.Module) -> str:
        """Return what the experts of a MoE module compute: a name of `sida.MoeConfig`.

        That is "relu", "relu2" (its square), "gelu" (exact), "gelu_tanh", "silu"; gated only,
        "silu_clamped" and "swiglu_clamped".
        """

    @abstractmethod
    def experts_per_token(self, module: nn.Module) -> int:
        """Return k, the experts that a MoE module's router chooses for a token."""

    def limit(self, module: nn.Module) -> float:
        """Return what a clamped activation cuts gate and up at."""
        return 7.0

    def transposed(self, module: nn.Module) -> bool:
        """Return whether tensors of all experts hold their matrices transposed.

        That is "up_proj" [E, H, I] or "gate_up_proj" [E, H, 2 I], and "down_proj" [E, I, H].
        """
        return False

    def parameter_name(self, name: str) -> str | None:
        """Return what sida calls a parameter of the experts.

        Args:
            name: Its name below the experts, as ``"3.fc1.weight"`` or ``"w_in"``.

        Returns:
            For a parameter of one expert, as `nn.Linear` has it: "0.up_proj.weight" [I, H],
            "0.down_proj.weight" [H, I] and, gated, "0.gate_proj.weight" [I, H], with the expert's
            number; biases "0.up_proj.bias" [I] and so on. For one of all experts: "up_proj"
            [E, I, H] or, gated, "gate_up_proj" [E, 2 I, H], the gate's rows first, and "down_proj"
            [E, H, I]; biases "up_proj_bias" [E, I] and so on. None for a parameter that is not the
            experts', where `experts_name` is "". By default the name as it is.
        """
        return name

    def forward(self, module: Any, experts: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a MoE module whose experts are computed by another.

        By default its own forward runs, which has to call `self.experts` as said above.

        Args:
            module: The MoE module; its submodule of experts is `experts`, or it has no parameters
                of experts now.
            experts: Computes the experts.
            *args: What the module is called with.
            **kwargs: The same, by name.

        Returns:
            What the module returns.
        """
        return type(module).forward(module, *args, **kwargs)

    def choose_experts(self, module: Any, hidden_states: Tensor) -> Tensor:
        """Return the experts that a MoE module's router would choose.

        Asked with the input of the layer before, so that experts may come early: a guess, which
        changes no result. Without an answer nothing is guessed, and `stats()["look_ahead"]` says
        so.

        Args:
            module: The MoE module.
            hidden_states: [T, H].

        Returns:
            Expert ids [T, k].
        """
        raise ValueError(f"{type(self).__name__} does not say what routers choose: choose_experts")

    # What offloading asks for; nothing to be overridden.

    def choices(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what a layer's router chooses; see `ExpertAdapter.choices`."""
        return self.choose_experts(self._layers[layer], hidden)

    def config(self, dtype: str) -> MoeConfig:
        """Return the shape of all experts, computed in `dtype`."""
        return self._form.config(len(self._layers), dtype)

    def parameters(self, layer: int) -> list[ExpertParameter]:
        """Return the parameters of a layer's experts."""
        experts = self.own_experts(layer)
        found = []
        for name, own in self._form.names.items():
            path, _, last = own.rpartition(".")
            found.append(ExpertParameter(experts.get_submodule(path), last, f"experts.{name}"))
        return found

    def arrays(self, layer: int) -> list[ExpertArrays] | None:
        """Return every expert's weights; None where gate and up are apart, or transposed."""
        form = self._form
        if form.transposed or (form.gated and not form.stacked):
            return None
        weights = {p.key.partition(".")[2]: p.weight.detach() for p in self.parameters(layer)}
        if not all(weight.is_contiguous() for weight in weights.values()):
            return None
        arrays = []
        for expert in range(form.experts):
            names = self._places(expert)
            parts = [None if name is None else weights[name] for name in names]
            if form.stacked:
                parts = [None if part is None else part[expert] for part in parts]
            up, down, up_bias, down_bias = parts
            assert up is not None and down is not None
            arrays.append((up, down, up_bias, down_bias))
        return arrays

    def as_parameters(self, expert: int, arrays: ExpertArrays) -> dict[str, Tensor]:
        """Return an expert's weights as the module's parameters hold them."""
        names, form = self._form.names, self._form
        found: dict[str, Tensor] = {}
        for name, array in zip(self._places(expert), arrays, strict=True):
            if name is None or array is None:
                continue
            if form.stacked:
                is_turned = form.transposed and array.dim() == 2
                found[names[name]] = (array.T if is_turned else array)[None]
            elif form.gated and ".up_proj." in name:
                gate, up = array.chunk(2)
                found[names[name.replace("up_proj", "gate_proj")]] = gate
                found[names[name]] = up
            else:
                found[names[name]] = array
        return found

    def stand_in(self, layer: int) -> ModuleExperts:
        """Return what stands for the experts of every layer."""
        return ModuleExperts(self._form) if self.experts_name else BesideExperts(self._form)

    def experts(self, layer: int) -> nn.Module:
        """Return the module that is a layer's experts now, or that has their parameters."""
        module = self._layers[layer]
        experts = getattr(module, self._children[layer], module)
        assert isinstance(experts, nn.Module)
        return experts

    def install(
        self, layer: int, compute: Compute, compute_predicted: ComputePredicted | None
    ) -> None:
        """Let `compute` stand in for a layer's experts, and the module run as `forward` says."""
        super().install(layer, compute, compute_predicted)
        if not self.experts_name and layer not in self._taken:
            self._taken[layer] = TakenParameters(
                self._layers[layer], self.parameters(layer), {*self._form.names.values()}
            )
        if compute_predicted is not None or type(self).forward is ModuleAdapter.forward:
            return
        module, experts = self._layers[layer], self.experts(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward(module, experts, *args, **kwargs)

        module.forward = forward

    def remove(self, layer: int) -> None:
        """Put the layer's own experts and forward back."""
        if layer not in self._taken:
            super().remove(layer)
            return
        module = self._own_experts.pop(layer)
        delattr(module, BESIDE)
        module.__dict__.pop("forward", None)
        self._taken.pop(layer).give_back()

    def _places(self, expert: int) -> list[str | None]:
        """Return sida's names of what holds an expert's up and down projection and biases."""
        form = self._form
        if form.stacked:
            up = "gate_up_proj" if form.gated else "up_proj"
            names = [up, "down_proj", f"{up}_bias", "down_proj_bias"]
        else:
            parts = ("up_proj.weight", "down_proj.weight", "up_proj.bias", "down_proj.bias")
            names = [f"{expert}.{part}" for part in parts]
        return [name if name in form.names else None for name in names]

    def _form_of(self, name: str, module: nn.Module) -> ModuleForm:
        """Read what a MoE module's experts are.

        Raises:
            ValueError: They are not as expected.
            TypeError: The adapter answers with a value of another type.
        """
        where = f"{name} ({type(module).__name__})"
        is_beside = not self.experts_name
        experts = getattr(module, self.experts_name or BESIDE, module if is_beside else None)
        if not isinstance(experts, nn.Module):
            raise ValueError(
                f"{where}: expected a submodule {self.experts_name!r} that holds the experts and "
                f"nothing else, found {'none' if experts is None else type(experts).__name__}; "
                f"experts_name of {type(self).__name__} names another"
            )
        if isinstance(experts, ModuleExperts):
            return experts.form
        if is_beside and type(self).forward is ModuleAdapter.forward:
            raise ValueError(
                f"{where}: expected {type(self).__name__}.forward to say how the module runs, "
                'since with experts_name "" the module has no parameters of experts meanwhile'
            )
        names = self._names(experts, where)
        parameters = {name: experts.get_parameter(own) for name, own in names.items()}
        transposed = self._answer("transposed", module, bool)
        count, stacked, shapes = read_shapes(parameters, where, transposed=transposed)
        form = ModuleForm(
            names,
            shapes,
            count,
            stacked,
            transposed,
            self._answer("activation", module, str),
            float(self._answer("limit", module, float, int)),
            self._answer("experts_per_token", module, int),
        )
        try:
            form.config(1, "f32")
        except ValueError as error:
            raise ValueError(f"{where}, as {type(self).__name__} describes it: {error}") from error
        return form

    def _names(self, experts: nn.Module, where: str) -> dict[str, str]:
        """Return the names of all parameters of a module's experts, by sida's names."""
        names: dict[str, str] = {}
        for own, _ in experts.named_parameters():
            name = self.parameter_name(own)
            if name is None and not self.experts_name:
                continue
            asked = f"{where}: expected {type(self).__name__}.parameter_name({own!r}) to be"
            if not isinstance(name, str) or not NAMES.fullmatch(name):
                raise ValueError(f"{asked} {EXPECTED}; got {name!r}")
            if name in names:
                raise ValueError(f"{asked} another name than that of {names[name]!r}, got {name!r}")
            names[name] = own
        extra = [name for name, _ in experts.named_buffers()]
        if not self.experts_name:
            if not names:
                raise ValueError(
                    f"{where}: expected parameters of experts, but "
                    f"{type(self).__name__}.parameter_name() is None for all of the module's"
                )
        elif not names or extra:
            raise ValueError(
                f"{where}: expected {self.experts_name!r} to hold the experts' parameters and "
                f"nothing else, found {'the buffer ' + extra[0] if extra else 'none'}"
            )
        return names

    def _answer(self, method: str, module: nn.Module, *kinds: type) -> Any:
        """Ask the adapter about a module.

        Raises:
            TypeError: The answer is of none of these types.
        """
        answer = getattr(self, method)(module)
        if not isinstance(answer, kinds) or (isinstance(answer, bool) and bool not in kinds):
            raise TypeError(
                f"expected {type(self).__name__}.{method}() to return "
                f"{' or '.join(kind.__name__ for kind in kinds)}, got {answer!r}"
            )
        return answer
