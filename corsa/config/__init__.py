"""The configuration of experiments: frozen and typed; unknown keys are refused.

Fields that change a result enter a step's identity (`corsa.flow`); fields that only say how it is run (`Placement`) do
not. This package imports neither torch nor ray: a pipeline is planned from it before either is needed.
"""

from corsa.config.base import Frozen as Frozen
from corsa.config.base import plain as plain
from corsa.config.evaluation import EvaluationConfig as EvaluationConfig
from corsa.config.evaluation import SamplingConfig as SamplingConfig
from corsa.config.method import SEEDS as SEEDS
from corsa.config.method import STEPS as STEPS
from corsa.config.method import AlphaEditConfig as AlphaEditConfig
from corsa.config.method import FLearningConfig as FLearningConfig
from corsa.config.method import InContextConfig as InContextConfig
from corsa.config.method import LocateThenEditConfig as LocateThenEditConfig
from corsa.config.method import LocFtConfig as LocFtConfig
from corsa.config.method import LoraConfig as LoraConfig
from corsa.config.method import MemitConfig as MemitConfig
from corsa.config.method import MethodSettings as MethodSettings
from corsa.config.method import PCGrad as PCGrad
from corsa.config.method import Radius as Radius
from corsa.config.method import StepConfig as StepConfig
from corsa.config.method import published_trainer as published_trainer
from corsa.config.model import Dtype as Dtype
from corsa.config.model import ModelConfig as ModelConfig
from corsa.config.runtime import Placement as Placement
from corsa.config.runtime import RunSettings as RunSettings
from corsa.config.runtime import ShardingConfig as ShardingConfig
from corsa.config.training import ALONE as ALONE
from corsa.config.training import RIDGE as RIDGE
from corsa.config.training import RIDGE_GAIN as RIDGE_GAIN
from corsa.config.training import TRAININGS as TRAININGS
from corsa.config.training import AnswerEnd as AnswerEnd
from corsa.config.training import TrainingConfig as TrainingConfig
from corsa.config.training import published_training as published_training
