# cluster.yaml with the places of one installation filled in: the file for `ray up`. No resources.

variable "region" {
  type = string
}

variable "zones" {
  type = list(string)
}

variable "image" {
  description = "AMI of all nodes."
  type        = string
}

variable "subnets" {
  description = "Ids, one per zone."
  type        = list(string)
}

variable "node_group" {
  description = "Id of the security group of all nodes."
  type        = string
}

variable "head_group" {
  description = "Id of the security group that the head has too."
  type        = string
}

variable "head_profile" {
  description = "Name of the instance profile of the head."
  type        = string
}

variable "worker_profile" {
  description = "Name of the instance profile of the workers."
  type        = string
}

variable "weights" {
  description = "Host name of the NFS server with the weights."
  type        = string
}

variable "max_workers" {
  description = "Workers of all types together."
  type        = number
}

locals {
  shipped = yamldecode(file("${path.module}/../../../../cluster.yaml"))
  head    = local.shipped.head_node_type
}

output "yaml" {
  value = yamlencode(merge(local.shipped, {
    max_workers = var.max_workers
    provider = merge(local.shipped.provider, {
      region            = var.region
      availability_zone = join(",", var.zones)
    })
    available_node_types = {
      for name, type in local.shipped.available_node_types : name => merge(type, {
        node_config = merge(type.node_config, {
          ImageId            = var.image
          SubnetIds          = var.subnets
          SecurityGroupIds   = name == local.head ? [var.node_group, var.head_group] : [var.node_group]
          IamInstanceProfile = { Name = name == local.head ? var.head_profile : var.worker_profile }
        })
      })
    }
    initialization_commands = [
      for command in local.shipped.initialization_commands :
      replace(command, "fs-00000000000000000.efs.us-west-2.amazonaws.com", var.weights)
    ]
  }))
}
