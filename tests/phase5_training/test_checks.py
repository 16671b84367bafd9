"""Objects that cannot be trained or saved are refused before training."""

import pytest
import torch
from torch import nn

from phase5_training.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_report")


def net():
    return nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Scaled(nn.Module):
    """A loss that learns a temperature."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs * self.scale, targets)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class TestOptimizer:
    def test_of_another_model(self, pipeline, task_files, runs):
        run = pipeline(net(), *task_files(), optimizer=sgd(net().parameters()))
        with pytest.raises(UsageError, match=r"holds 6 of 6 parameters that are neither.*shape \(8, 13\)"):
            run.setup()
        assert not list(runs.iterdir())

    def test_of_a_part_of_the_model(self, pipeline, task_files):
        model = net()
        part = sgd(model[0].parameters())
        with pytest.raises(UsageError, match=r"4 trainable .* model\.2\.weight first; .*requires_grad_"):
            pipeline(model, *task_files(), optimizer=part).setup()
        model[2:].requires_grad_(False)
        assert pipeline(model, *task_files(), optimizer=part, epochs=1).run().success

    def test_without_what_the_loss_learns(self, pipeline, task_files):
        model, loss = net(), Scaled()
        with pytest.raises(UsageError, match=r"1 trainable .* loss\.scale first"):
            pipeline(model, *task_files(), loss=loss, optimizer=sgd(model.parameters())).setup()
        both = sgd([*model.parameters(), *loss.parameters()])
        assert pipeline(model, *task_files(), loss=loss, optimizer=both, epochs=1).run().success
        assert loss.scale != 1

    def test_that_is_none(self, pipeline, task_files):
        with pytest.raises(UsageError, match="optimizer is a Sequential; pass a name, or a torch"):
            pipeline(net(), *task_files(), optimizer=net())


class Remembering(nn.Sequential):
    """A model with something in its state that is no tensor."""

    extra: object = {"version": 1}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        pass


class TestState:
    @pytest.mark.parametrize(
        ("extra", "found"), [({"version": 1}, "dict"), (torch.eye(2).to_sparse(), "torch.sparse_coo tensor")]
    )
    def test_what_no_checkpoint_holds(self, pipeline, task_files, runs, extra, found):
        model = Remembering(*net())
        model.extra = extra
        wanted = rf"model\.state_dict\(\) holds '_extra_state', a {found}.*keep it in a buffer"
        with pytest.raises(UsageError, match=wanted):
            pipeline(model, *task_files()).setup()
        assert not list(runs.iterdir())

    def test_a_tensor_is_held(self, pipeline, task_files):
        model = Remembering(*net())
        model.extra = torch.ones(2)
        assert pipeline(model, *task_files(), epochs=1).run().success

    def test_of_a_loss(self, pipeline, task_files):
        class Own(Scaled):
            def get_extra_state(self):
                return "text"

        with pytest.raises(UsageError, match=r"loss\.state_dict\(\) holds '_extra_state', a str"):
            pipeline(net(), *task_files(), loss=Own()).setup()


def test_an_assertion_in_the_model_is_a_plain_error(pipeline, task_files):
    class Strict(nn.Sequential):
        def forward(self, x):
            assert x.shape[1] == 5, "wanted 5 features"
            return super().forward(x)

    with pytest.raises(UsageError, match=r"cannot take the data.*AssertionError: wanted 5 features"):
        pipeline(Strict(*net()), *task_files()).setup()
