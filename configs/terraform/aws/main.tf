# What `ray up cluster.yaml` needs on AWS: a network, security groups, roles, the file system of the weights, the
# bucket of results, and two Valkeys, for the jobs and for the state of Ray's head. Run book: docs/operations.md.
terraform {
  required_version = ">= 1.6"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.70, < 7.0"
    }
    random = {
      source  = "hashicorp/random"
      version = "~> 3.6"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { Application = var.name }
  }
}

variable "name" {
  description = "Prefix of all names."
  type        = string
  default     = "weft"
}

variable "region" {
  type    = string
  default = "us-west-2"
}

variable "zones" {
  description = "Zones that offer the instance types of cluster.yaml. GPUs are scarce: several."
  type        = list(string)
  default     = ["us-west-2a", "us-west-2b", "us-west-2c"]
  validation {
    condition     = length(var.zones) >= 2
    error_message = "The stores are kept in two zones at least."
  }
}

variable "admins" {
  description = "Networks that reach the nodes by SSH, as `ray up` does: [\"203.0.113.7/32\"]."
  type        = list(string)
  validation {
    condition     = !contains(var.admins, "0.0.0.0/0")
    error_message = "SSH is not for everybody: name your own network."
  }
}

variable "callers" {
  description = "Networks that reach HTTPS on the head."
  type        = list(string)
  default     = ["0.0.0.0/0"]
}

variable "image" {
  description = "AMI of all nodes; null: the newest Deep Learning Base AMI (Ubuntu 24.04)."
  type        = string
  default     = null
}

variable "max_workers" {
  type    = number
  default = 16
}

variable "store_type" {
  description = "Node type of the Valkey with the jobs. Sizing: docs/operations.md."
  type        = string
  default     = "cache.m7g.large"
}

data "aws_ssm_parameter" "image" {
  name = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
}

module "cluster_file" {
  source         = "./cluster_file"
  region         = var.region
  zones          = var.zones
  image          = coalesce(var.image, nonsensitive(data.aws_ssm_parameter.image.value))
  subnets        = aws_subnet.nodes[*].id
  node_group     = aws_security_group.nodes.id
  head_group     = aws_security_group.head.id
  head_profile   = aws_iam_instance_profile.head.name
  worker_profile = aws_iam_instance_profile.worker.name
  weights        = aws_efs_file_system.weights.dns_name
  max_workers    = var.max_workers
}

output "cluster_yaml" {
  description = "For `ray up`: terraform output -raw cluster_yaml > ../../../aws.yaml"
  value       = module.cluster_file.yaml
}

output "environment" {
  description = "For .env: terraform output -raw environment > ../../../.env; add WEFT_PUBLIC_URL and HF_TOKEN."
  sensitive   = true
  value       = <<-EOT
    REDIS_URL=rediss://app:${random_password.store["app"].result}@${local.addresses["jobs"]}:6379
    RAY_REDIS_ADDRESS=rediss://${local.addresses["state"]}:6379
    RAY_REDIS_USERNAME=ray
    RAY_REDIS_PASSWORD=${random_password.store["ray"].result}
    S3_BUCKET_NAME=${aws_s3_bucket.results.bucket}
    S3_REGION=${var.region}
    WEFT_API_KEY=${random_password.api_key.result}
    WEFT_JWT_SECRET=${random_password.jwt_secret.result}
    WEFT_TRUSTED_PROXIES=127.0.0.1
  EOT
}
