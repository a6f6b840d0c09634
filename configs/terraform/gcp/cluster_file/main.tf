# configs/clusters/gcp.yaml with the places of one installation filled in: the file for `ray up`. No resources.

variable "project" {
  type = string
}

variable "region" {
  type = string
}

variable "zone" {
  type = string
}

variable "image" {
  description = "Image of all nodes: projects/PROJECT/global/images/NAME; null: that of the file."
  type        = string
  default     = null
}

variable "subnetwork" {
  description = "Self link."
  type        = string
}

variable "node_tag" {
  description = "Network tag of all nodes."
  type        = string
}

variable "head_tag" {
  description = "Network tag that the head has too."
  type        = string
}

variable "weights" {
  description = "Address of the NFS server with the weights."
  type        = string
}

variable "max_workers" {
  description = "Workers of all types together."
  type        = number
}

locals {
  shipped = yamldecode(file("${path.module}/../../../clusters/gcp.yaml"))
  head    = local.shipped.head_node_type
}

output "yaml" {
  value = yamlencode(merge(local.shipped, {
    max_workers = var.max_workers
    provider = merge(local.shipped.provider, {
      project_id        = var.project
      region            = var.region
      availability_zone = var.zone
    })
    available_node_types = {
      for name, type in local.shipped.available_node_types : name => merge(type, {
        node_config = merge(type.node_config, {
          disks = [for disk in type.node_config.disks : merge(disk, {
            initializeParams = merge(disk.initializeParams, {
              diskType    = "zones/${var.zone}/diskTypes/pd-balanced"
              sourceImage = coalesce(var.image, disk.initializeParams.sourceImage)
            })
          })]
          networkInterfaces = [{
            subnetwork    = var.subnetwork
            accessConfigs = [{ name = "External NAT", type = "ONE_TO_ONE_NAT" }]
          }]
          tags = { items = name == local.head ? [var.node_tag, var.head_tag] : [var.node_tag] }
        })
      })
    }
    initialization_commands = [
      for command in local.shipped.initialization_commands :
      replace(command, "10.0.0.2:/models", "${var.weights}:/models")
    ]
  }))
}
